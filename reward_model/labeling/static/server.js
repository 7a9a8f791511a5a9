// Exchanges with the server, which outlast a lost connection.

const TIMEOUT_MS = 20_000;
const csrf = document.querySelector("meta[name=csrf-token]")?.content ?? "";
const owned = `labeling.${document.getElementById("app").dataset.user}.`;

/** The parsed answer; throws {status, text, why}, `text` with the fix, status 0 where there was no answer at all. */
export async function ask(method, path, body) {
  let answer;
  try {
    answer = await fetch(path, {
      method,
      headers: { Accept: "application/json", "Content-Type": "application/json", "X-CSRF-Token": csrf },
      body: body && JSON.stringify(body),
      credentials: "same-origin",
      cache: "no-store",
      signal: AbortSignal.timeout(TIMEOUT_MS),
    });
  } catch {
    throw { status: 0, text: "", why: "No connection to the server." };
  }
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) throw { status: answer.status, text: sentences(content.error, content.fix), why: sentences(content.error) };
  content.now_ms = Date.parse(answer.headers.get("Date") ?? "") || Date.now(); // the lease runs by the server's clock
  return content;
}

function sentences(...clauses) {
  const told = clauses.filter(Boolean);
  return told.map((clause) => `${clause[0].toUpperCase()}${clause.slice(1)}.`.replace(/\.\.$/, ".")).join(" ");
}

/** Whether it may go well when it is tried again. */
export const passing = (status) => status === 0 || status === 408 || status === 429 || status >= 500;

function pause(ms) {
  return new Promise((go) => {
    const timer = setTimeout(done, ms);
    addEventListener("online", done, { once: true });
    function done() {
      clearTimeout(timer);
      removeEventListener("online", done);
      go();
    }
  });
}

/** Sends until there is an answer, and tells `say` how it stands; what a repetition cannot mend is thrown. */
export async function persist(method, path, body, say, kept = "") {
  for (let wait = 1000; ; wait = Math.min(2 * wait, 15_000)) {
    try {
      const content = await ask(method, path, body);
      if (wait > 1000) say("");
      return content;
    } catch (error) {
      if (!passing(error.status)) throw error;
      say(`${error.why || "The server cannot answer just now."} ${kept} Trying again by itself.`, "warn");
      await pause(wait);
    }
  }
}

/** Values that a closed tab does not lose, of this user in this browser. */
export const storage = {
  write(name, value) {
    try {
      if (value === null) localStorage.removeItem(owned + name);
      else localStorage.setItem(owned + name, JSON.stringify(value));
    } catch {
      // A browser may refuse to store anything; a judgment that is being sent is still in memory.
    }
  },
  read(name) {
    try {
      return JSON.parse(localStorage.getItem(owned + name));
    } catch {
      return null;
    }
  },
};

/** 32 hexadecimal digits; crypto.randomUUID exists over HTTPS only. */
export function submissionId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
