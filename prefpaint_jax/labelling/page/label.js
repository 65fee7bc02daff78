// The page of an annotator: one item at a time, by keyboard, mouse or touch.

import { ask, credential, Refused, signOut, takeName, takeToken } from "./api.js";
import { itemElements, letter, make, mark } from "./cards.js";
import { drawExamples } from "./guidelines.js";
import { addresses, keepOnly, load } from "./images.js";
import { listenToKeys } from "./keys.js";
import { resetZoom, toggleZoom, zoomable } from "./zoom.js";

// In this tab's storage, for each person: a reload loses nothing.
const DRAFTS = "prefpaint.drafts"; // {item: {scores, seconds}} that were not submitted
const PENDING = "prefpaint.pending"; // an answer that was sent and not acknowledged

const $ = (id) => document.getElementById(id);
const stage = $("stage");
const own = (key) => `${key} ${JSON.stringify(credential())}`;
const stored = (key) => JSON.parse(sessionStorage.getItem(own(key)) ?? "null");
const store = (key, value) => sessionStorage.setItem(own(key), JSON.stringify(value));

let state = null; // as the server tells it
let item = null; // on the page
let shown = null; // its elements
let scores = {}; // of the item: {candidate ID: {criterion: score}}
let current = { candidate: 0, criterion: 0 };
let busy = true; // an answer or an item is on its way
let since = 0; // when the item came into view, in ms
let seconds = 0; // in which it was in view before

// ------------------------------------------------------------------------------------- messages

function view(name) {
  document.body.dataset.view = name;
}

/** Says something on the page until `notify("")`. */
function notify(line) {
  if ($("notice").textContent !== line) $("notice").textContent = line;
  $("notice").hidden = !line;
}

function onLost(line) {
  const kept = stored(PENDING) ? "Your answer is kept and will be sent again." : "Trying again.";
  notify(line ? `${line} ${kept}` : "");
}

function timeLeft(left) {
  if (left === null || left === undefined) return "";
  const minutes = Math.max(1, Math.round(left / 60));
  const hours = Math.floor(minutes / 60);
  return `${hours ? `${hours} h ${minutes % 60}` : minutes} min left`;
}

function showState() {
  $("progress").max = Math.max(1, state.total);
  $("progress").value = state.done;
  $("left").textContent = item?.item ? timeLeft(state.seconds_left) : "";
  $("who").textContent = state.annotator;
  $("leave").hidden = !state.open;
  document.body.dataset.mode = state.mode;
  $("hint").textContent = state.mode === "scores" ? "0–7 score, arrows move" : "";
}

// --------------------------------------------------------------------------- people and requests

async function signIn(line) {
  const { open } = await ask("/api/mode", onLost);
  $("refusal").textContent = line;
  $("given-label").textContent = open ? "Your name" : "Your invitation link";
  $("given").maxLength = open ? 40 : 500;
  $("given").value = "";
  $("given-note").textContent = open
    ? "The name is written beside your scores. Use the same one each time."
    : "Open the link that you were sent, or paste it here.";
  $("enter").onsubmit = (event) => {
    event.preventDefault();
    const given = $("given").value.trim();
    if (open) takeName(given);
    else takeToken(given.includes("#") ? given : `#${given}`);
    start();
  };
  view("sign-in");
  $("given").focus();
}

/** Runs an action; a refusal becomes a line on the page. Nothing else happens meanwhile. */
async function during(action) {
  busy = true;
  stage.setAttribute("aria-busy", "true");
  try {
    await action();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.status === 401) await signIn(error.message);
    else notify(error.message);
  } finally {
    busy = false;
    stage.removeAttribute("aria-busy");
  }
}

function start() {
  return during(async () => {
    if (!credential()) return signIn("");
    notify("");
    state = await ask("/api/state", onLost);
    const pending = stored(PENDING);
    if (pending) await send(pending); // it was on its way when the page was left
    else await show(await ask("/api/item", onLost));
  });
}

/** Sends an answer until the server acknowledges it, then shows the next item. */
async function send(body) {
  store(PENDING, body);
  let answer;
  try {
    answer = await ask("/api/answer", onLost, body);
  } catch (error) {
    if (error.status !== 401) store(PENDING, null);
    if (error.status === 401 || item) throw error;
    await show(await ask("/api/item", onLost)); // after a reload
    throw error;
  }
  store(PENDING, null);
  const drafts = stored(DRAFTS) ?? {};
  delete drafts[body.item];
  store(DRAFTS, drafts);
  state = answer.state;
  notify("");
  await show(answer.next);
}

// ------------------------------------------------------------------------------------- the item

async function show(next) {
  if (next.item === null) return showDone(next);
  const elements = await itemElements(next, state, handlers, onLost);
  [item, shown] = [next, elements];
  const draft = (stored(DRAFTS) ?? {})[item.item];
  scores = draft?.scores ?? structuredClone(item.answer?.scores ?? {});
  seconds = draft?.seconds ?? 0;
  since = performance.now();
  stage.replaceChildren(shown.prompt, shown.tabs, shown.row);
  stage.style.setProperty("--ratio", shown.known.naturalWidth / shown.known.naturalHeight);
  stage.style.setProperty("--count", item.candidates.length);
  stage.classList.remove("incomplete");
  $("toggle").setAttribute("aria-pressed", "false");
  resetZoom(shown.centre);
  markPixels();
  watchSwipes();
  const corrects = item.answer !== null;
  $("place").replaceChildren(
    make("b", { textContent: item.number }),
    ` of ${state.total}${corrects ? ", answered" : ""}`,
  );
  $("back").disabled = item.previous === null;
  $("forward").hidden = !corrects;
  showState();
  view("item");
  scrollTo(0, 0);
  if (state.mode === "scores") select(firstEmpty() ?? { candidate: 0, criterion: 0 });
  else document.activeElement?.blur();
  refresh();
  keepOnly([...addresses(item), ...(item.ahead ?? [])]);
  for (const url of item.ahead ?? []) load(url, () => {}).catch(() => {});
}

function showDone(next) {
  [item, shown] = [next, null];
  keepOnly([]);
  stage.replaceChildren();
  $("place").textContent = "";
  showState();
  $("done-title").textContent = `Thank you, ${state.annotator}.`;
  $("done-text").textContent = state.total
    ? `All ${state.total} prompts are ${state.mode === "pairs" ? "compared" : "scored"} and saved.`
    : "There is nothing to score at present.";
  $("done-back").hidden = next.previous === null;
  view("done");
  $("done-title").focus();
}

/** Small images are shown as their pixels, as the policy made them. */
function markPixels() {
  const frame = stage.querySelector(".card .frame");
  stage.classList.toggle("pixels", frame.clientWidth >= 3 * shown.known.naturalWidth);
}

/** A swipe on a narrow screen chooses the candidate that it ends on. */
function watchSwipes() {
  const { row } = shown;
  let timer = 0;
  row.addEventListener("scroll", () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      const candidate = Math.round(row.scrollLeft / row.clientWidth);
      if (shown?.row !== row || candidate === current.candidate) return;
      current = firstEmpty(candidate) ?? { candidate, criterion: 0 };
      groupOf(current)?.focus({ preventScroll: true });
      refresh();
    }, 120);
  });
}

const groupOf = ({ candidate, criterion }) =>
  shown.row.children[candidate].querySelectorAll(".scale")[criterion];

function scoreOf(candidate, criterion) {
  return scores[item.candidates[candidate].id]?.[state.criteria[criterion]];
}

/** Returns the first scale without a score, of all candidates or of one. */
function firstEmpty(only) {
  for (let candidate = only ?? 0; candidate < item.candidates.length; candidate++) {
    for (let criterion = 0; criterion < state.criteria.length; criterion++) {
      if (scoreOf(candidate, criterion) === undefined) return { candidate, criterion };
    }
    if (only !== undefined) break;
  }
  return null;
}

/** Makes a scale the current one, and brings its candidate into view. */
function select(cell) {
  current = cell;
  const group = groupOf(cell);
  group.focus({ preventScroll: true });
  const card = shown.row.children[cell.candidate];
  if (card.offsetWidth < shown.row.scrollWidth - 1 && shown.row.scrollWidth > shown.row.clientWidth) {
    shown.row.scrollTo({ left: card.offsetLeft - shown.row.offsetLeft });
  } else {
    card.scrollIntoView({ block: "nearest" });
  }
  refresh();
}

function refresh() {
  if (state.mode === "scores") mark(shown.row, shown.tabs, state, scoreOf, current);
  const pair = state.mode === "pairs";
  const missing = pair ? 0 : count((value) => value === undefined);
  const submit = $("submit");
  submit.classList.toggle("open", missing > 0);
  submit.classList.toggle("chosen", pair && item.answer !== null && item.answer.better === null);
  const key = make("kbd", { textContent: pair ? "↓" : "Enter" });
  if (pair) submit.replaceChildren("Equal ", key);
  else if (missing) submit.replaceChildren(`${missing} to score`);
  else submit.replaceChildren("Submit ", key);
}

function count(wanted) {
  let sum = 0;
  for (let candidate = 0; candidate < item.candidates.length; candidate++) {
    state.criteria.forEach((_, criterion) => (sum += wanted(scoreOf(candidate, criterion))));
  }
  return sum;
}

const elapsed = () => seconds + (document.hidden ? 0 : (performance.now() - since) / 1000);

function saveDraft() {
  if (!item?.item || state.mode !== "scores") return;
  store(DRAFTS, { ...stored(DRAFTS), [item.item]: { scores, seconds: elapsed() } });
}

// ------------------------------------------------------------------------------------- actions

function score(candidate, criterion, value, byKey) {
  if (busy) return;
  const id = item.candidates[candidate].id;
  scores[id] = { ...scores[id], [state.criteria[criterion]]: value };
  saveDraft();
  $("status").textContent = `Candidate ${letter(candidate)}, ${state.criteria[criterion]}: ${value}`;
  const index = candidate * state.criteria.length + criterion + 1;
  const following = {
    candidate: Math.floor(index / state.criteria.length),
    criterion: index % state.criteria.length,
  };
  const last = following.candidate >= item.candidates.length;
  const next = last ? firstEmpty() : following;
  // A tap corrects one score; it moves on only while there is something to fill.
  const moves = next && (byKey || scoreOf(next.candidate, next.criterion) === undefined);
  select(moves ? next : { candidate, criterion });
}

function submit() {
  if (busy) return;
  if (state.mode === "pairs") return choose(null);
  const empty = firstEmpty();
  if (empty) {
    select(empty);
    $("status").textContent = "Some scores are missing.";
    return;
  }
  notify("");
  during(() => send({ item: item.item, seconds: spent(), scores }));
}

function choose(candidate) {
  if (busy) return;
  notify("");
  const better = candidate === null ? null : item.candidates[candidate].id;
  const buttons = [...shown.row.querySelectorAll(".choice")];
  buttons.forEach((button, index) => button.setAttribute("aria-pressed", index === candidate));
  $("submit").classList.toggle("chosen", candidate === null);
  during(() => send({ item: item.item, seconds: spent(), better }));
}

const spent = () => Math.round(10 * elapsed()) / 10;

function back() {
  if (busy || !item || item.previous === null) return;
  saveDraft();
  const path = `/api/item?item=${encodeURIComponent(item.previous)}`;
  during(async () => show(await ask(path, onLost)));
}

function forward() {
  if (busy) return;
  saveDraft();
  during(async () => show(await ask("/api/item", onLost)));
}

function toggle() {
  const on = stage.classList.toggle("incomplete");
  $("toggle").setAttribute("aria-pressed", String(on));
}

const handlers = {
  toggle,
  score,
  show: (candidate) => select(firstEmpty(candidate) ?? { candidate, criterion: 0 }),
  focus: (candidate, criterion) => {
    if (current.candidate === candidate && current.criterion === criterion) return;
    select({ candidate, criterion });
  },
  choose,
};

// --------------------------------------------------------------------------------------- the start

function guidelines() {
  if (!$("guidelines").open) $("guidelines").showModal();
}

function move(candidates, criteria) {
  if (busy) return;
  const clamp = (value, length) => Math.min(length - 1, Math.max(0, value));
  select({
    candidate: clamp(current.candidate + candidates, item.candidates.length),
    criterion: clamp(current.criterion + criteria, state.criteria.length),
  });
}

function listen() {
  listenToKeys({
    view: () => document.body.dataset.view,
    mode: () => state.mode,
    most: () => state.most,
    score: (value) => score(current.candidate, current.criterion, value, true),
    move,
    submit,
    choose,
    back,
    forward: () => $("forward").hidden || forward(),
    toggle,
    guidelines,
  });
  zoomable(stage, (zoom) => $("zoom").setAttribute("aria-pressed", String(zoom > 1)));
  const presses = { back, toggle, submit, forward, zoom: toggleZoom, help: guidelines };
  for (const [id, action] of Object.entries(presses)) $(id).addEventListener("click", action);
  $("done-back").addEventListener("click", back);
  $("close").addEventListener("click", () => $("guidelines").close());
  $("guidelines").addEventListener("click", (event) => {
    if (event.target === $("guidelines")) $("guidelines").close(); // beside the text
  });
  $("leave").addEventListener("click", () => {
    if (busy) return;
    saveDraft();
    signOut();
    start();
  });
  addEventListener("hashchange", () => takeToken() && start());
  addEventListener("resize", () => shown && markPixels());
  addEventListener("pagehide", saveDraft);
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) seconds += (performance.now() - since) / 1000;
    else since = performance.now();
  });
}

drawExamples($("guidelines"));
listen();
takeToken();
start();
