// The time that a person was at work: the tab in view, and some input in the last half minute.

const IDLE_MS = 30_000;

export const clock = {
  ms: 0,
  mark: performance.now(),
  input: performance.now(),
  visible: document.visibilityState === "visible",
  /** Milliseconds at work since the last reset. */
  count() {
    const now = performance.now();
    if (this.visible) this.ms += Math.max(0, Math.min(now, this.input + IDLE_MS) - this.mark);
    this.mark = now;
    return this.ms;
  },
  touch() {
    this.count();
    this.input = performance.now();
  },
  reset() {
    this.ms = 0;
    this.mark = this.input = performance.now();
  },
  get running() {
    return this.visible && performance.now() - this.input < IDLE_MS;
  },
};

for (const kind of ["keydown", "pointerdown", "pointermove", "wheel", "scroll", "touchmove"]) {
  document.addEventListener(kind, () => clock.touch(), { capture: true, passive: true });
}
document.addEventListener("visibilitychange", () => {
  clock.count();
  clock.visible = document.visibilityState === "visible";
  if (clock.visible) clock.touch();
});
