// What this tab keeps until the server has it, for each person apart: a reload loses nothing.

import { credential } from "./api.js";

const DRAFTS = "prefpaint.drafts"; // {item: {scores, seconds}} that were not submitted
const PENDING = "prefpaint.pending"; // an answer that was sent and not acknowledged

const own = (key) => `${key} ${JSON.stringify(credential())}`;
const stored = (key) => JSON.parse(sessionStorage.getItem(own(key)) ?? "null");
const store = (key, value) => sessionStorage.setItem(own(key), JSON.stringify(value));

export const pending = () => stored(PENDING);
export const keepPending = (body) => store(PENDING, body);
export const dropPending = () => store(PENDING, null);

export const draftOf = (item) => stored(DRAFTS)?.[item];

export function keepDraft(item, draft) {
  store(DRAFTS, { ...stored(DRAFTS), [item]: draft });
}

export function dropDraft(item) {
  const { [item]: _, ...others } = stored(DRAFTS) ?? {};
  store(DRAFTS, others);
}

/** Seconds in which an item was in view: a tab in the background does not count. */
export class Clock {
  #before = 0;
  #since = performance.now();

  constructor() {
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) this.#before += (performance.now() - this.#since) / 1000;
      else this.#since = performance.now();
    });
  }

  start(seconds = 0) {
    this.#before = seconds;
    this.#since = performance.now();
  }

  get seconds() {
    const now = document.hidden ? 0 : (performance.now() - this.#since) / 1000;
    return Math.round(10 * (this.#before + now)) / 10;
  }
}
