// The labeling page: shows one task at a time, sends what was chosen, and shows what came back with the answer.
//
// A choice is sent under a submission_id that the browser makes. Until the server has answered, it is kept here and in
// localStorage and sent again, so that a lost connection or a closed tab loses nothing and stores nothing twice.
// Texts reach the DOM as textContent, but for `html`, which the server has cleaned (rendering.py).

import { clock } from "/static/clock.js";
import { wordDiff } from "/static/diff.js";
import { ask, passing, persist, storage, submissionId } from "/static/server.js";

const GUARD_MS = 250; // a new item takes no answer that early: a second press was meant for the one before
const TICK_MS = 5_000;
const POLL_MS = 15_000;
const TOLD_MS = 6_000;
const FIRST_POLL_MS = 1_500; // the totals that come with the last answer may be a second old

const $ = (id) => document.getElementById(id);

const page = { task: null, busy: true, shownAt: 0, confidence: 0, raw: false, diff: false, polling: 0, telling: 0 };
const session = { from: Infinity, ms: 0 }; // judgments before this page was opened, and the time since
const lease = { since: 0, lasts: 0, asking: false };
let ranking = { groups: [], marked: -1 }; // places, the best group first; those in a group tie

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// --- exchanges ---------------------------------------------------------------------------------------------------

async function load() {
  await turn(() => persist("GET", "/api/task", undefined, say));
}

/** One exchange with the server, during which nothing else can be judged; shows what comes back. */
async function turn(exchange) {
  clearTimeout(page.polling);
  page.busy = true;
  try {
    receive(await exchange());
  } catch (error) {
    if (!("status" in error)) throw error;
    refused(error);
  }
}

function receive(content) {
  page.busy = false;
  if (content.progress) showProgress(content.progress);
  if (content.paused) return showPaused(content.paused);
  if (!content.task) return showEmpty(content.progress);
  lease.since = performance.now();
  lease.lasts = content.task.lease_expires_ms - content.now_ms;
  showTask(content.task);
}

/** Keeps the lease of somebody who is at work on a long text. */
async function renew() {
  showSession();
  const asked = performance.now();
  if (!page.task || page.busy || !clock.running || lease.asking || asked - lease.since < lease.lasts / 3) return;
  const id = page.task.assignment_id;
  lease.asking = true;
  try {
    const content = await ask("POST", "/api/renew", { assignment_id: id });
    if (page.task?.assignment_id !== id) return;
    lease.since = asked;
    lease.lasts = content.lease_expires_ms - content.now_ms;
  } catch (error) {
    if (page.task?.assignment_id === id && !page.busy && !passing(error.status)) refused(error);
  } finally {
    lease.asking = false;
  }
}

// --- judging -----------------------------------------------------------------------------------------------------

/** Sends an answer, once; `button` stays lit until the next item comes, and `label` says in words what was chosen. */
async function judge(button, label, choice, fields = {}) {
  if (page.busy || !page.task || performance.now() - page.shownAt < GUARD_MS) return;
  page.busy = true;
  say("");
  button.classList.add("chosen");
  $("work").dataset.sent = "yes";
  const pending = {
    assignment_id: page.task.assignment_id,
    submission_id: submissionId(),
    choice,
    value: null,
    ranks: null,
    confidence: page.confidence || null,
    notes: typed("notes"),
    ms_active: Math.round(clock.count()),
    ...fields,
  };
  storage.write("pending", pending);
  session.ms += clock.ms;
  showSession();
  await deliver(pending, label);
}

async function deliver(pending, label) {
  await turn(async () => {
    try {
      const content = await persist("POST", "/api/judgments", pending, say, "Your answer is kept.");
      storage.write("pending", null);
      showLast(content.policies ?? [], label);
      return content;
    } catch (error) {
      // After a login, what was refused with these two can be sent.
      if (error.status !== 401 && error.status !== 403) storage.write("pending", null);
      throw error;
    }
  });
}

function compare(step) {
  if (page.task?.kind !== "pair") return;
  const button = document.querySelector(`[data-do="${step}"]`);
  judge(button, button.getAttribute("aria-label"), "compare", { value: step - 4 });
}

/** Asked once only: an undo that is repeated, since its answer was lost, would take back one judgment more. */
async function undo() {
  if (page.busy || $("app").dataset.state === "paused") return;
  const shown = page.task;
  await turn(async () => {
    let content;
    try {
      content = await ask("POST", "/api/undo", {});
    } catch (error) {
      if (error.status !== 409 && !passing(error.status)) throw error;
      const now = await persist("GET", "/api/task", undefined, say);
      say(error.status === 409 ? error.text : "No answer from the server: look whether this was undone.", "warn");
      return now;
    }
    if (!content.task?.previous) {
      say("There is nothing to undo.", "told");
      return { ...content, task: content.task ?? shown };
    }
    $("last").hidden = true;
    const gone = content.task.passed_over;
    if (gone) {
      const what = gone > 1 ? `The ${gone} items that you skipped or flagged last` : "The item that you skipped or flagged last";
      say(`${what} cannot come back. Undone is the one before, with what you had chosen.`, "warn");
    } else say("Undone. This is the last item again, with what you had chosen.", "told");
    return content;
  });
}

/** What stands in a field, without what no database stores: null, and half of a surrogate pair. */
function typed(id) {
  const text = $(id).value.replaceAll("\0", "");
  return text.toWellFormed?.() ?? text;
}

function askFlag() {
  if (page.busy || !page.task) return;
  $("flag-note").value = $("notes").value;
  $("flag").returnValue = "";
  $("flag").showModal();
}
$("flag").addEventListener("close", () => {
  if ($("flag").returnValue !== "flag") return;
  judge(document.querySelector("[data-do=flag]"), "Flagged", "flag", { notes: typed("flag-note") });
});

// --- ranking -----------------------------------------------------------------------------------------------------

/** Ranks by place, 1 the best; equal ones share theirs and leave no gap. */
function ranks() {
  const found = [];
  ranking.groups.forEach((group, i) => group.forEach((place) => (found[place] = i + 1)));
  return found;
}

/** Which group the marked response is in, -1 if none is marked, and where in it. */
function marked() {
  const at = ranking.groups.findIndex((group) => group.includes(ranking.marked));
  return [at, ranking.groups[at]?.indexOf(ranking.marked)];
}

const ranked = {
  place(place) {
    if (place >= page.task.responses.length) return;
    if (!ranking.groups.flat().includes(place)) ranking.groups.push([place]);
    ranking.marked = place;
  },
  /** One rank up or down: out of its ties if it has any, else past the next rank, which stays as it is. */
  move(by) {
    const { groups } = ranking;
    const [at, within] = marked();
    if (at < 0) return;
    const [group] = groups.splice(at, 1);
    if (group.length === 1) return void groups.splice(Math.max(0, at + by), 0, group);
    const alone = group.splice(within, 1);
    groups.splice(at, 0, ...(by < 0 ? [alone, group] : [group, alone]));
  },
  tie() {
    const { groups } = ranking;
    const [at, within] = marked();
    if (within > 0) groups.splice(at + 1, 0, groups[at].splice(within));
    else if (at > 0) groups[at - 1].push(...groups.splice(at, 1)[0]);
  },
  /** Who tied with it, or did not, stays so. */
  out() {
    const order = ranking.groups.flat();
    const i = order.indexOf(ranking.marked);
    if (i < 0) return;
    const left = ranking.groups.map((group) => group.filter((place) => place !== ranking.marked));
    ranking = { groups: left.filter((group) => group.length), marked: order[i + 1] ?? order[i - 1] ?? -1 };
  },
  reset() {
    ranking = { groups: [], marked: -1 };
  },
};

function rank(step, ...values) {
  if (page.busy || page.task?.kind !== "ranking") return;
  ranked[step](...values);
  showRanking();
  say(orderInWords() || "No response has a place.");
}

function submitRanking() {
  if (page.task?.kind !== "ranking") return;
  if (ranking.groups.flat().length < page.task.responses.length) return say("Every response needs a place first.");
  judge(document.querySelector("[data-do=submit]"), orderInWords(), "rank", { ranks: ranks() });
}

function orderInWords() {
  return ranking.groups.map((group) => group.map((place) => place + 1).join(" = ")).join(" > ");
}

function showRanking() {
  const chips = ranking.groups.flatMap((group) => group.map((place, i) => {
    const chip = element("button", { type: "button", class: "place", "data-do": `place-${place}` }, String(place + 1));
    if (place === ranking.marked) chip.setAttribute("aria-current", "true");
    return element("li", { "data-tied": i > 0 ? "yes" : "no" }, chip);
  }));
  $("order").replaceChildren(...chips);
  $("order-hint").hidden = chips.length > 0;
  const found = ranks();
  document.querySelectorAll(".response").forEach((card, place) => {
    card.querySelector(".rank").textContent = found[place] ? `rank ${found[place]}` : "";
    card.toggleAttribute("data-ranked", Boolean(found[place]));
  });
  document.querySelector("[data-do=submit]").disabled = chips.length < (page.task?.responses.length ?? 0);
}

// --- what is seen ------------------------------------------------------------------------------------------------

/** Tells a screen reader; a `warn` stays on the screen until something else is said, what is `told` for a while. */
function say(text, tone = "") {
  clearTimeout(page.telling);
  $("status").textContent = text;
  $("status").dataset.tone = tone;
  if (tone === "told") page.telling = setTimeout(() => ($("status").dataset.tone = ""), TOLD_MS);
}

function showTask(task) {
  const again = page.task?.assignment_id === task.assignment_id && !task.previous;
  page.task = task;
  $("app").dataset.state = task.kind;
  $("app").dataset.assignment = task.assignment_id;
  $("notice").hidden = true;
  $("work").hidden = $("dock").hidden = false;
  delete $("work").dataset.sent;
  document.querySelectorAll(".chosen, .before").forEach((button) => button.classList.remove("chosen", "before"));
  if (again) return;
  page.shownAt = performance.now();
  clock.reset();
  $("bad-label").textContent = task.kind === "pair" ? "Both bad" : "All bad";
  showTurns(task.prompt);
  const cards = task.responses.map((_, place) => card(place));
  $("responses").replaceChildren(...cards);
  $("responses").dataset.count = task.responses.length;
  showTexts();
  restore(task.previous);
  scrollTo(0, 0);
  if (!task.previous && $("status").dataset.tone !== "warn") say("Next item.");
}

function card(place) {
  const pair = page.task.kind === "pair";
  const name = pair ? "AB"[place] : String(place + 1);
  const title = pair ? name : element("button", { type: "button", class: "place", "data-do": `place-${place}` }, name);
  const heading = element("h2", {}, element("span", { class: "name" }, title), element("span", { class: "rank" }));
  const side = pair ? "ab"[place] : "";
  return element(
    "article",
    { class: "response", "data-side": side, "aria-label": `Response ${name}` },
    heading,
    element("div", { class: "text", dir: "auto" }),
  );
}

/** What was chosen before an undo, to change or to give again. */
function restore(previous) {
  ranked.reset();
  setConfidence(previous?.confidence ?? 0);
  $("notes").value = previous?.notes ?? "";
  showNotes(Boolean(previous?.notes));
  if (previous?.ranks) {
    const groups = Array.from({ length: Math.max(...previous.ranks) }, () => []);
    previous.ranks.forEach((rank, place) => groups[rank - 1].push(place));
    ranking = { groups, marked: groups.at(-1).at(-1) };
  }
  if (page.task.kind === "ranking") showRanking();
  const before = previous?.choice === "compare" ? previous.value + 4 : previous?.choice;
  document.querySelector(`.desk [data-do="${before}"]`)?.classList.add("before");
}

function showTurns(turns) {
  const blocks = turns.map((turn) => {
    const text = element("div", { class: "text", dir: "auto" });
    fill(text, turn);
    return element("article", { class: "turn", "data-role": turn.role }, element("h3", {}, turn.role), text);
  });
  $("turns").replaceChildren(...blocks);
  expandPrompt(false);
  $("more").hidden = $("turns").scrollHeight <= $("turns").clientHeight + 4;
  $("turns").scrollTop = turns.length > 1 ? $("turns").scrollHeight : 0; // the last turn is what is answered
}

function expandPrompt(open) {
  $("chat").toggleAttribute("data-open", open);
  $("more").setAttribute("aria-expanded", String(open));
  $("more").firstChild.data = open ? "Show less " : "Show all ";
}

function fill(box, source) {
  box.classList.remove("plain");
  box.classList.toggle("raw", page.raw);
  if (page.raw) box.textContent = source.text;
  else box.innerHTML = source.html; // cleaned by the server
}

function showTexts() {
  const { responses, prompt } = page.task;
  const boxes = [...document.querySelectorAll(".response .text")];
  document.querySelectorAll(".turn .text").forEach((box, i) => fill(box, prompt[i]));
  if (page.diff && page.task.kind === "pair") {
    const sides = wordDiff(responses[0].text, responses[1].text);
    boxes.forEach((box, side) => {
      const parts = sides[side].map(({ text, same }) => (same ? text : element("mark", {}, text)));
      box.replaceChildren(...parts);
      box.classList.toggle("raw", page.raw);
      box.classList.add("plain");
    });
  } else boxes.forEach((box, place) => fill(box, responses[place]));
}

function toggleView(name) {
  if (!page.task || (name === "diff" && page.task.kind !== "pair")) return;
  page[name] = !page[name];
  document.querySelector(`[data-do=${name}]`).setAttribute("aria-pressed", String(page[name]));
  showTexts();
  const said = { raw: ["Rendered text.", "Raw text."], diff: ["Nothing is marked.", "Words that differ are marked."] };
  say(said[name][Number(page[name])]);
}

function setConfidence(value) {
  page.confidence = value;
  for (let n = 1; n <= 5; n += 1) {
    document.querySelector(`[data-do=confidence-${n}]`).setAttribute("aria-pressed", String(n === value));
  }
}

function showNotes(open) {
  $("notes").hidden = !open;
  document.querySelector("[data-do=note]").setAttribute("aria-expanded", String(open));
}

function showProgress(progress) {
  $("bar").max = Math.max(1, progress.wanted);
  $("bar").value = progress.done;
  $("bar").textContent = `${progress.done} of ${progress.wanted}`;
  $("app").dataset.judged = progress.judged;
  session.from = Math.min(session.from, progress.judged);
  showSession();
}

function showSession() {
  const judged = $("app").dataset.judged;
  if (judged === undefined) return;
  const minutes = Math.round((session.ms + (page.task && !page.busy ? clock.count() : 0)) / 60_000);
  const total = `${$("bar").value} of ${$("bar").max}`;
  $("counts").textContent = `${total} · yours ${judged} · now ${judged - session.from} in ${minutes} min`;
}

function showLast(policies, label) {
  const pair = policies.length === 2 && page.task?.kind !== "ranking";
  const names = policies.map((policy, place) => [
    place ? " · " : "",
    element("b", {}, pair ? "AB"[place] : String(place + 1)),
    " ",
    element("bdi", {}, policy || "unnamed"),
  ]);
  $("last").replaceChildren(`Last: ${label || "sent"}. `, ...(policies.some(Boolean) ? names.flat() : []));
  $("last").hidden = false;
}

function notice(state, title, text, button, action) {
  page.task = null;
  $("app").dataset.state = state;
  delete $("app").dataset.assignment;
  $("work").hidden = $("dock").hidden = true;
  $("notice").hidden = false;
  $("notice-title").textContent = title;
  $("notice-text").textContent = text;
  $("notice-button").textContent = button;
  $("notice-button").onclick = action;
  $("notice-button").focus();
}

function showPaused(why) {
  const text = `${why}. What you judged is stored. Please talk to the person who runs this project.`;
  notice("paused", "Paused", text, "Look again", load);
}

function showEmpty(progress) {
  const all = progress.wanted ? "You have judged or skipped all items, or others have the rest." : "No items are queued yet.";
  const title = progress.wanted ? "Nothing left for you" : "Nothing to judge yet";
  const text = `${all} This page looks for new ones by itself.`;
  const wait = $("app").dataset.state === "empty" ? POLL_MS : FIRST_POLL_MS;
  if ($("app").dataset.state !== "empty") notice("empty", title, text, "Look again", load);
  page.polling = setTimeout(() => (document.hidden ? showEmpty(progress) : load()), wait);
}

/** A refusal that a repetition would not mend: say what it means and what to do. */
function refused({ status, text }) {
  page.busy = false;
  if (status === 401) {
    const kept = "Your last answer is kept in this browser and is sent when you are back.";
    const text = storage.read("pending") ? kept : "";
    notice("logged-out", "You are logged out", text, "Log in", () => location.assign("/login"));
  } else if (status === 409) {
    const calm = `${text} What you judged before is stored.`;
    notice("lost", "This item is no longer before you", calm, "Next item", load);
  } else {
    const why = text || `The answer was ${status}.`;
    notice("refused", "The server refused this", why, "Reload the page", () => location.reload());
  }
}

// --- keys and buttons --------------------------------------------------------------------------------------------

const ACTIONS = {
  both_bad: (button) => judge(button, $("bad-label").textContent, "both_bad"),
  skip: (button) => judge(button, "Skipped", "skip"),
  flag: askFlag,
  undo,
  raw: () => toggleView("raw"),
  diff: () => toggleView("diff"),
  prompt: () => expandPrompt(!$("chat").hasAttribute("data-open")),
  help: () => $("help").showModal(),
  instructions: () => $("instructions")?.showModal(),
  note: () => {
    showNotes(true);
    $("notes").focus();
  },
  confidence: () => setConfidence((page.confidence + 1) % 6),
  tie: () => (page.task?.kind === "ranking" ? rank("tie") : compare(4)),
  earlier: () => rank("move", -1),
  later: () => rank("move", 1),
  out: () => rank("out"),
  reset: () => rank("reset"),
  submit: submitRanking,
};
const KEYS = {
  b: "both_bad", s: "skip", f: "flag", u: "undo", r: "raw", d: "diff", p: "prompt", i: "instructions", n: "note",
  c: "confidence", t: "tie", "=": "tie", "?": "help", x: "reset",
};
const RANKING_KEYS = { ArrowLeft: "earlier", ArrowRight: "later", Backspace: "out", Delete: "out", Enter: "submit" };

function act(name) {
  const [, kind, number] = /^(place|confidence)-(\d+)$/.exec(name) ?? [];
  if (kind === "place") rank("place", Number(number));
  else if (kind === "confidence") setConfidence(page.confidence === Number(number) ? 0 : Number(number));
  else if (/^[1-7]$/.test(name)) compare(Number(name));
  else ACTIONS[name](document.querySelector(`.desk [data-do="${name}"]`));
}

/** The action of a key; digits and letters by their place on the keyboard where the layout has others there. */
function actionOf({ key, code, target }) {
  const ranks = page.task?.kind === "ranking";
  const inside = target.closest("button, a, summary, select");
  if (ranks && RANKING_KEYS[key] && !(inside && key === "Enter")) return RANKING_KEYS[key];
  const letter = /^Key[A-Z]$/.test(code) && !/^[a-z]$/i.test(key) ? code[3] : key;
  if (KEYS[letter.toLowerCase()]) return KEYS[letter.toLowerCase()];
  const digit = Number(/^(?:Digit|Numpad)(\d)$/.exec(code)?.[1] ?? NaN);
  if (ranks) return digit ? `place-${digit - 1}` : undefined;
  if (digit === 0) return "4";
  return digit <= 7 ? String(digit) : undefined;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (document.querySelector("dialog[open]")) return;
  if (event.target.matches("textarea, input")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const action = actionOf(event);
  if (!action) return;
  event.preventDefault();
  if (!event.repeat) act(action); // a key that is held down is pressed once
});
$("help").addEventListener("keydown", (event) => event.key === "?" && $("help").close());
// A click leaves the focus where it was, or the next Enter would press the button once more.
document.addEventListener("mousedown", (event) => event.target.closest("button[data-do]") && event.preventDefault());
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  if (button) act(button.dataset.do);
});

/** Instructions come by themselves to who has not seen them, or not as they are now. */
function instruct() {
  const text = $("instructions")?.textContent;
  if (!text || storage.read("instructions") === text) return;
  storage.write("instructions", text);
  $("instructions").showModal();
}

setInterval(renew, TICK_MS);
instruct();
const kept = storage.read("pending");
if (kept) deliver(kept, "sent again");
else load();
