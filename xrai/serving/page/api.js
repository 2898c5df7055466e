// The HTTP interface for the page: films and models in the page's own terms.

import { readPng } from "./png.js";
import { reasonWords, say } from "./words.js";

const TRY_LATER = new Set([429, 503]); // an upload, by itself
const TRY_AGAIN = new Set([401, 408]); // when a person asks for it

// The model: {run, outputs, numImages, split, isPhantom, trainedOn}
export async function fetchModel() {
  return toModel(await (await ask("/v1/model")).json());
}

// {films, numWaiting}: all films in the order of the list, and how many more are being scored; null
// where nothing changed since the last answer
export async function fetchFilms() {
  const answer = await ask("/v1/films", { headers: tag ? { "If-None-Match": tag } : {} });
  if (answer.status === 304) return null;
  const text = await answer.text();
  const found = text === lastText ? null : toList(JSON.parse(text));
  // Only now: a list that was cut off, or cannot be read, has to be asked for again
  tag = answer.headers.get("ETag") ?? "";
  lastText = text;
  return found;
}
let tag = "";
let lastText = "";

// A film that is not there any more counts as deleted
export async function deleteFilm(film) {
  try {
    await ask(film.addresses.film, { method: "DELETE" });
  } catch (error) {
    if (!error.isGone) throw error;
  }
}

export async function loadImage(film) {
  const { id, bytes } = ahead;
  ahead = { id: "", bytes: null };
  return readPng((id === film.id && (await bytes)) || (await fetchImage(film)));
}

// Keeps the image of a film that is likely to be opened next: the browser may not (no-store)
export function fetchAhead(film) {
  const bytes = fetchImage(film, { priority: "low" }).catch(() => null);
  ahead = { id: film.id, bytes };
}
let ahead = { id: "", bytes: null }; // of one film; null where that failed

async function fetchImage(film, options = {}) {
  return (await ask(film.addresses.image, options)).arrayBuffer();
}

export async function loadHeat(film, name) {
  const answer = await ask(`${film.addresses.film}/heat.png?of=${encodeURIComponent(name)}`);
  return createImageBitmap(await answer.blob());
}

async function ask(address, options = {}) {
  const answer = await fetch(address, { credentials: "same-origin", ...options });
  if (answer.ok || answer.status === 304) return answer;
  const error = new Error(await reasonOf(answer.status, await answer.text()));
  const isLogin = answer.status === 401;
  throw Object.assign(error, { isAnswer: true, isLogin, isGone: answer.status === 404 });
}

// Sends one file. Returns {films, refused}, where `refused` has {name, reason} for each refused
// file of a zip; or {reason}, with `retryAfterS` where the server asks for a retry, and with
// `isLost` where it did not answer. `onProgress` gets the share that has been sent.
export function upload(file, onProgress) {
  const request = new XMLHttpRequest();
  const body = new FormData();
  body.append("file", file, file.webkitRelativePath || file.name);
  return new Promise((done) => {
    request.upload.addEventListener("progress", (event) => {
      if (event.lengthComputable) onProgress(event.loaded / event.total);
    });
    request.addEventListener("load", () => done(answerOf(request)));
    request.addEventListener("error", () => done({ isLost: true, reason: say("upload_lost") }));
    request.open("POST", "/v1/films");
    request.send(body);
  });
}

function answerOf(request) {
  const { status, responseText } = request;
  if (status >= 200 && status < 300) return filmsOf(responseText);
  const reason = reasonOf(status, responseText);
  if (TRY_LATER.has(status)) {
    const seconds = Number(request.getResponseHeader("Retry-After") ?? 5);
    return { reason, retryAfterS: Number.isFinite(seconds) ? seconds : 5 };
  }
  return { reason, isFinal: status >= 400 && status < 500 && !TRY_AGAIN.has(status) };
}

function filmsOf(text) {
  try {
    const { films, refused = [] } = JSON.parse(text);
    const inWords = refused.map(({ name, reason }) => ({ name, reason: reasonWords(reason).text }));
    return { films: films.map(toFilm), refused: inWords };
  } catch {
    return { reason: say("upload_unknown") }; // from a proxy, say
  }
}

function reasonOf(status, text) {
  if (status === 413) return say("upload_too_large");
  try {
    const { detail } = JSON.parse(text);
    if (detail) return reasonWords(detail).text;
    return say("upload_refused", { status: String(status) });
  } catch {
    return say("upload_refused", { status: String(status) });
  }
}

function toList({ films, num_waiting: numWaiting }) {
  return { films: films.map(toFilm), numWaiting };
}

function toFilm(said) {
  const address = `/v1/films/${encodeURIComponent(said.id)}`;
  const isReadable = Object.keys(said.probabilities).length > 0;
  return {
    ...said,
    isReadable,
    isReview: said.decision === "review",
    hasImage: isReadable,
    isPositive: said.is_positive,
    top: topOf(said, Object.keys(said.probabilities)),
    called: topOf(said, said.calls.filter((name) => name in said.probabilities)),
    listed: said.score_of === null ? null : outputOf(said, said.score_of), // what ranks it
    values: toValues(said.window),
    addresses: { film: address, image: `${address}/image`, thumbnail: `${address}/thumbnail.png` },
  };
}

// How stored values are shown: see `ownWindow` of window.js
function toValues(window) {
  if (!window) return {};
  const { centre, width, slope, intercept, is_inverse: isInverse } = window;
  return { centre, width, slope, intercept, isInverse };
}

// The most probable one of these classes or findings
function topOf(said, names) {
  const { probabilities } = said;
  const [first] = names.sort((a, b) => probabilities[b] - probabilities[a]);
  return first === undefined ? null : outputOf(said, first);
}

// What is said of a class or finding of a film
function outputOf({ probabilities, thresholds, calls }, name) {
  const threshold = thresholds[name] ?? null;
  const isCalled = threshold === null ? calls.includes(name) : probabilities[name] >= threshold;
  return { name, probability: probabilities[name], threshold, isCalled };
}

function toModel(said) {
  const { num_images: numImages, is_phantom: isPhantom, trained_on: trainedOn } = said;
  const outputs = said.outputs.map((output) => ({ prevalence: null, prior: null, ...output }));
  return { ...said, outputs, numImages, isPhantom, trainedOn };
}
