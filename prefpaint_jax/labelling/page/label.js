// The page of an annotator: one item at a time, by keyboard, mouse or touch.

import { ask, credential, Refused, signOut, takeToken } from "./api.js";
import { itemElements, letter, make, mark } from "./cards.js";
import {
  Clock, draftOf, dropDraft, dropPending, keepDraft, keepPending, pending,
} from "./drafts.js";
import { drawExamples } from "./guidelines.js";
import { addresses, keepOnly, load } from "./images.js";
import { listenToKeys } from "./keys.js";
import { same, Sheet } from "./sheet.js";
import { signIn } from "./sign-in.js";
import { resetZoom, toggleZoom, zoomable } from "./zoom.js";

const $ = (id) => document.getElementById(id);
const stage = $("stage");
const clock = new Clock();

let state = null; // as the server tells it
let item = null; // on the page
let shown = null; // its elements
let sheet = null; // its scores
let current = { candidate: 0, criterion: 0 }; // the cell that a digit fills
let busy = true; // an answer or an item is on its way

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
  const kept = pending() ? "Your answer is kept and will be sent again." : "Trying again.";
  notify(line ? `${line} ${kept}` : "");
}

function timeLeft(seconds) {
  if (seconds === null) return "";
  const minutes = Math.max(1, Math.round(seconds / 60));
  const hours = Math.floor(minutes / 60);
  return `${hours ? `${hours} h ${minutes % 60}` : minutes} min left`;
}

function showState() {
  document.body.dataset.mode = state.mode;
  $("progress").max = Math.max(1, state.total);
  $("progress").value = state.done;
  $("left").textContent = item.item === null || item.answer ? "" : timeLeft(state.seconds_left);
  $("who").textContent = state.annotator;
  $("leave").hidden = !state.open;
  $("hint").textContent = state.mode === "scores" ? `0–${state.most} score, arrows move` : "";
}

// ------------------------------------------------------------------------------------- requests

/** Runs an action; a refusal becomes a line on the page. Nothing else happens meanwhile. */
async function during(action) {
  busy = true;
  stage.setAttribute("aria-busy", "true");
  try {
    await action();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.status === 401) await askWho(error.message);
    else notify(error.message);
  } finally {
    busy = false;
    stage.removeAttribute("aria-busy");
  }
}

async function askWho(line) {
  await signIn(line, start, onLost);
  view("sign-in");
  $("given").focus();
}

function start() {
  return during(async () => {
    if (!credential()) return askWho("");
    notify("");
    item = shown = null;
    state = await ask("/api/state", onLost);
    // An answer may have been on its way when the page was left.
    if (pending()) await send(pending());
    else await show(await ask("/api/item", onLost));
  });
}

/** Sends an answer until the server acknowledges it, then shows the next item. */
async function send(body) {
  keepPending(body);
  let answer;
  try {
    answer = await ask("/api/answer", onLost, body);
  } catch (error) {
    if (error.status === 401) throw error; // kept for this person
    dropPending();
    if (!item) await show(await ask("/api/item", onLost));
    throw error;
  }
  dropPending();
  dropDraft(body.item);
  state = answer.state;
  await show(answer.next);
}

// ------------------------------------------------------------------------------------- the item

async function show(next) {
  if (next.item === null) return showDone(next);
  shown = await itemElements(next, state, handlers, onLost);
  item = next;
  const draft = draftOf(item.item);
  sheet = new Sheet(item, state.criteria, draft?.scores ?? item.answer?.scores);
  clock.start(draft?.seconds);
  stage.replaceChildren(shown.prompt, shown.tabs, shown.row);
  stage.style.setProperty("--ratio", shown.known.naturalWidth / shown.known.naturalHeight);
  stage.style.setProperty("--count", item.candidates.length);
  stage.classList.remove("incomplete");
  $("toggle").setAttribute("aria-pressed", "false");
  resetZoom(shown.centre);
  watchSwipes();
  $("place").replaceChildren(make("b", { textContent: item.number }), ` of ${state.total}`);
  if (item.answer) $("place").append(", answered");
  $("status").textContent = `Prompt ${item.number} of ${state.total}`;
  $("back").disabled = item.previous === null;
  $("forward").hidden = !item.answer;
  showState();
  view("item");
  markPixels();
  scrollTo(0, 0);
  current = { candidate: 0, criterion: 0 };
  if (state.mode === "scores") select(sheet.empty()[0] ?? current);
  else document.activeElement?.blur(); // a key is for this pair, not for a button that was pressed
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
  const done = state.mode === "pairs" ? "pairs are compared" : "prompts are scored";
  $("done-text").textContent = state.total
    ? `All ${state.total} ${done} and saved. You can close this page.`
    : "There is nothing to do at present.";
  $("done-back").hidden = next.previous === null;
  view("done");
  $("done-title").focus();
}

/** Shows the pixels of small images as they are: a smooth enlargement hides faults. */
function markPixels() {
  const frame = stage.querySelector(".card .frame");
  stage.classList.toggle("pixels", frame.clientWidth >= 3 * shown.known.naturalWidth);
}

/** On a narrow screen, the candidate on which a swipe ends becomes the current one. */
function watchSwipes() {
  const { row } = shown;
  let timer = 0;
  row.addEventListener("scroll", () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      const candidate = Math.round(row.scrollLeft / row.clientWidth);
      if (shown?.row !== row || candidate === current.candidate) return;
      current = sheet.firstOf(candidate);
      scale(current).focus({ preventScroll: true });
      refresh();
    }, 120);
  });
}

const scale = ({ candidate, criterion }) =>
  shown.row.children[candidate].querySelectorAll(".scale")[criterion];

/** Makes a cell the current one, and brings its candidate into view. */
function select(cell) {
  current = cell;
  scale(cell).focus({ preventScroll: true });
  const { row } = shown;
  const card = row.children[cell.candidate];
  if (row.scrollWidth > row.clientWidth + 1) row.scrollTo({ left: card.offsetLeft - row.offsetLeft });
  else card.scrollIntoView({ block: "nearest" });
  refresh();
}

function refresh() {
  const submit = $("submit");
  const label = (text, key) => submit.replaceChildren(text, " ", make("kbd", { textContent: key }));
  if (state.mode === "pairs") {
    submit.classList.toggle("chosen", item.answer?.better === null);
    return label("Equal", "↓");
  }
  mark(shown.row, shown.tabs, sheet, current);
  const missing = sheet.empty().length;
  submit.classList.toggle("open", missing > 0);
  if (missing) submit.textContent = `${missing} to score`;
  else label("Submit", "Enter");
}

function saveDraft() {
  if (!shown || state.mode === "pairs") return;
  keepDraft(item.item, { scores: sheet.scores, seconds: clock.seconds });
}

// ------------------------------------------------------------------------------------- actions

function score(cell, value, byKey) {
  if (busy) return;
  sheet.set(cell, value);
  saveDraft();
  const name = state.criteria[cell.criterion];
  $("status").textContent = `Candidate ${letter(cell.candidate)}, ${name}: ${value}`;
  const next = sheet.after(cell);
  // A tap may correct one score: it moves on only to a cell without one.
  select(next && (byKey || sheet.of(next) === undefined) ? next : cell);
}

function submit() {
  if (busy) return;
  if (state.mode === "pairs") return choose(null);
  const [empty] = sheet.empty();
  if (empty) {
    select(empty);
    $("status").textContent = "Some scores are missing";
    return;
  }
  notify("");
  during(() => send({ item: item.item, seconds: clock.seconds, scores: sheet.scores }));
}

function choose(candidate) {
  if (busy) return;
  notify("");
  const better = candidate === null ? null : item.candidates[candidate].id;
  shown.row.querySelectorAll(".choice").forEach((button, index) => {
    button.setAttribute("aria-pressed", String(index === candidate));
  });
  $("submit").classList.toggle("chosen", candidate === null);
  during(() => send({ item: item.item, seconds: clock.seconds, better }));
}

function go(path) {
  if (busy) return;
  saveDraft();
  notify("");
  during(async () => show(await ask(path, onLost)));
}

function back() {
  if (item?.previous) go(`/api/item?item=${encodeURIComponent(item.previous)}`);
}

/** From a correction to the first item without an answer. */
function forward() {
  if (item?.answer) go("/api/item");
}

function toggle() {
  $("toggle").setAttribute("aria-pressed", String(stage.classList.toggle("incomplete")));
}

function guidelines() {
  if (!$("guidelines").open) $("guidelines").showModal();
}

/** Starts again as another person. */
function leave() {
  saveDraft();
  shown = null;
  signOut();
  location.reload();
}

const handlers = {
  toggle,
  choose,
  score: (cell, value) => score(cell, value, false),
  show: (candidate) => select(sheet.firstOf(candidate)),
  focus: (cell) => same(cell, current) || select(cell),
};

// --------------------------------------------------------------------------------------- start

listenToKeys({
  view: () => document.body.dataset.view,
  mode: () => state.mode,
  most: () => state.most,
  score: (value) => score(current, value, true),
  move: (candidates, criteria) => busy || select(sheet.near(current, candidates, criteria)),
  submit,
  choose,
  back,
  forward,
  toggle,
  guidelines,
});
zoomable(stage, (zoom) => $("zoom").setAttribute("aria-pressed", String(zoom > 1)));
const presses = { back, toggle, submit, forward, leave, zoom: toggleZoom, help: guidelines };
presses["done-back"] = back;
presses.close = () => $("guidelines").close();
for (const [id, action] of Object.entries(presses)) {
  $(id).addEventListener("click", () => action());
}
$("guidelines").addEventListener("click", (event) => {
  if (event.target === $("guidelines")) $("guidelines").close(); // beside the text
});
addEventListener("hashchange", () => {
  saveDraft();
  shown = null;
  if (takeToken()) location.reload();
});
addEventListener("resize", () => shown && markPixels());
addEventListener("pagehide", saveDraft);
drawExamples($("guidelines"));
takeToken();
start();
