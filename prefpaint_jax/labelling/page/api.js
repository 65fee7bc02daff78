// Requests of the page: who asks, and what happens when the connection is lost.

const TOKEN = "prefpaint.token"; // of an invitation link
const NAME = "prefpaint.name"; // where the server takes any name
const LONGEST_WAIT = 8; // seconds between two attempts
const TIMEOUT = 20; // seconds for an answer, after which the connection counts as lost

/** The server's one line about a request that it does not take. */
export class Refused extends Error {
  constructor(status, line) {
    super(`${line.trim() || `the server answered ${status}`}.`);
    this.status = status;
  }
}

/**
 * Moves the token of an invitation link, or a token itself, to this tab's storage.
 *
 * A letter that no header takes becomes one that no token has.
 */
export function takeToken(link = location.hash) {
  const token = link.slice(link.indexOf("#") + 1).replace(/[^!-~]/g, "?");
  if (!token) return false;
  sessionStorage.setItem(TOKEN, token);
  history.replaceState(null, "", location.pathname);
  return true;
}

/** Keeps a name in place of a token. */
export function takeName(name) {
  sessionStorage.setItem(NAME, name);
  sessionStorage.removeItem(TOKEN);
}

export function signOut() {
  sessionStorage.removeItem(NAME);
  sessionStorage.removeItem(TOKEN);
}

/** Returns the header that says who asks, or null. It also tells the drafts of people apart. */
export function credential() {
  const token = sessionStorage.getItem(TOKEN);
  if (token !== null) return { Authorization: `Bearer ${token}` };
  const name = sessionStorage.getItem(NAME);
  return name === null ? null : { "X-Annotator": encodeURIComponent(name) };
}

/** Returns the JSON of a path; a body makes it a POST. See `patient`. */
export function ask(path, onLost, body) {
  const headers = { ...credential() };
  const options = { headers };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  return patient(path, options, (response) => response.json(), onLost);
}

/**
 * Asks until the server answers, however long it is away.
 *
 * `onLost(line)` is told of each failed attempt, and `onLost(null)` when one succeeds after it.
 * Throws Refused where the server refuses the request itself (4xx).
 */
export async function patient(path, options, read, onLost) {
  for (let attempt = 0; ; attempt++) {
    let line = "The server cannot be reached.";
    try {
      const signal = AbortSignal.timeout(1000 * TIMEOUT);
      const response = await fetch(path, { ...options, signal });
      if (response.ok) {
        const answer = await read(response); // fails if the connection ends in the middle
        if (attempt) onLost(null);
        return answer;
      }
      const refusal = new Refused(response.status, await response.text());
      if (response.status < 500 && response.status !== 408) throw refusal;
      line = refusal.message; // such as a disk that is full
    } catch (error) {
      if (error instanceof Refused) throw error;
    }
    onLost(line);
    await pause(Math.min(LONGEST_WAIT, 2 ** attempt / 2));
  }
}

/** Waits for the seconds, or until the network is back. */
function pause(seconds) {
  return new Promise((resolve) => {
    const timer = setTimeout(done, 1000 * seconds);
    function done() {
      clearTimeout(timer);
      removeEventListener("online", done);
      resolve();
    }
    addEventListener("online", done);
  });
}
