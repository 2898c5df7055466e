// Sends files to the server, a few at a time, and shows each with its progress or its error.

import { announce, find, make } from "./dom.js";
import { percent, say } from "./words.js";

const AT_ONCE = 3;
const NUM_SHOWN = 30; // of those that wait
const NUM_TRIES = 4; // of a file whose connection breaks
const LONGEST_PAUSE_S = 120;

export class Uploads {
  // `send(file, onProgress)` is `upload` of api.js; `onAdded` is called after each answer
  constructor(send, onAdded) {
    this.send = send;
    this.onAdded = onAdded;
    this.files = []; // {name, file, state, share, tries, reason, isFinal}
    this.numDone = 0;
    this.numFilms = 0;
    this.pausedUntil = 0; // in ms, as of Date.now
    this.rows = new Map(); // elements of `files`
    find("uploads-cancel").addEventListener("click", () => this.cancel());
    find("uploads-close").addEventListener("click", () => this.clear());
    find("uploads-retry").addEventListener("click", () => this.retryAll());
    addEventListener("beforeunload", (event) => this.isBusy && event.preventDefault());
  }

  get isBusy() {
    return this.files.some((each) => each.state !== "failed");
  }

  // Whether there are files that may still be sent, those that failed included
  get hasUnsent() {
    return this.files.some((each) => !each.isFinal);
  }

  // `unread` has the names of files that could not even be read
  add(files, unread = []) {
    if (!this.files.length) this.clear();
    for (const name of unread) {
      const reason = say("upload_unread");
      this.files.push({ name, state: "failed", share: 0, reason, isFinal: true });
      announce(`${name}: ${reason}`);
    }
    for (const file of files) {
      const name = file.webkitRelativePath || file.name;
      this.files.push({ name, file, state: "waiting", share: 0, tries: 0 });
    }
    this.run();
  }

  clear() {
    this.files = [];
    this.numDone = 0;
    this.numFilms = 0;
    this.show();
  }

  cancel() {
    this.files = this.files.filter((each) => each.state !== "waiting");
    this.show();
  }

  retryAll() {
    for (const each of this.files) if (each.state === "failed" && !each.isFinal) this.again(each);
    this.run();
  }

  again(each) {
    Object.assign(each, { state: "waiting", share: 0, tries: 0 });
  }

  run() {
    const pause = this.pausedUntil - Date.now();
    if (pause > 0) {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.run(), Math.min(pause, 1000));
      this.show();
      return;
    }
    let numSending = this.files.filter((each) => each.state === "sending").length;
    for (const each of this.files) {
      if (numSending >= AT_ONCE) break;
      if (each.state !== "waiting") continue;
      numSending += 1;
      this.start(each);
    }
    this.show();
  }

  async start(each) {
    Object.assign(each, { state: "sending", share: 0, tries: each.tries + 1 });
    const answer = await this.send(each.file, (share) => {
      each.share = share;
      this.showRow(each);
      this.showBar();
    });
    this.finish(each, answer);
    this.run();
  }

  finish(each, answer) {
    if (answer.films) {
      this.files = this.files.filter((other) => other !== each);
      this.numDone += 1;
      this.numFilms += answer.films.length;
      for (const { name, reason } of answer.refused) {
        this.files.push({ name, state: "failed", share: 0, reason, isFinal: true });
        announce(`${name}: ${reason}`);
      }
      this.onAdded();
      if (!this.isBusy) announce(say("upload_done", { n: this.numFilms }));
    } else if (answer.retryAfterS !== undefined) {
      const pause = Math.min(LONGEST_PAUSE_S, Math.max(1, answer.retryAfterS));
      this.pausedUntil = Math.max(this.pausedUntil, Date.now() + 1000 * pause);
      Object.assign(each, { state: "waiting", tries: each.tries - 1 });
    } else if (answer.isLost && each.tries < NUM_TRIES) {
      this.pausedUntil = Date.now() + 1000 * 2 ** (each.tries - 1);
      each.state = "waiting";
    } else {
      const { reason, isFinal = false } = answer;
      Object.assign(each, { state: "failed", reason, isFinal });
      announce(`${each.name}: ${answer.reason}`);
    }
  }

  // ------------------------------------------------------------------------------------- showing

  show() {
    const failed = this.files.filter((each) => each.state === "failed");
    const numFailed = failed.length;
    const isBusy = this.isBusy;
    find("uploads").hidden = !this.files.length && !this.numDone;
    find("uploads-cancel").hidden = !this.files.some((each) => each.state === "waiting");
    find("uploads-close").hidden = isBusy;
    find("uploads-retry").hidden = failed.filter((each) => !each.isFinal).length < 2;
    find("uploads-words").textContent = this.summary(numFailed, isBusy);
    this.showBar();
    this.showRows();
  }

  summary(numFailed, isBusy) {
    const all = this.numDone + this.files.length;
    const pause = Math.ceil((this.pausedUntil - Date.now()) / 1000);
    const parts = [];
    if (isBusy || numFailed) parts.push(say("upload_progress", { done: this.numDone, all }));
    else parts.push(say("upload_done", { n: this.numFilms }));
    if (numFailed) parts.push(say("upload_failed", { n: numFailed }));
    if (isBusy && pause > 0) parts.push(say("upload_pause", { s: pause }));
    return parts.join(" · ");
  }

  showBar() {
    const shares = this.files.map((each) => (each.state === "failed" ? 1 : 0.9 * each.share));
    const done = shares.reduce((sum, share) => sum + share, this.numDone);
    find("uploads-bar").value = done / Math.max(1, this.numDone + this.files.length);
    find("uploads-bar").hidden = !this.isBusy;
  }

  showRows() {
    const order = { failed: 0, sending: 1, waiting: 2 };
    const sorted = [...this.files].sort((a, b) => order[a.state] - order[b.state]);
    const numWaiting = sorted.filter((each) => each.state === "waiting").length;
    const shown = sorted.slice(0, sorted.length - Math.max(0, numWaiting - NUM_SHOWN));
    const rows = shown.map((each) => this.rows.get(each) ?? this.makeRow(each));
    this.rows = new Map(shown.map((each, i) => [each, rows[i]]));
    shown.forEach((each) => this.showRow(each));
    const n = sorted.length - shown.length;
    if (n) rows.push(make("li", "soft", say("upload_more", { n })));
    find("uploads-files").replaceChildren(...rows);
  }

  makeRow(each) {
    const name = make("span", "name", each.name);
    name.dir = "auto";
    name.title = each.name;
    const bar = make("progress");
    bar.ariaLabel = each.name;
    const again = make("button", "", say("upload_retry"));
    again.type = "button";
    again.addEventListener("click", () => {
      this.again(each);
      this.run();
    });
    return make("li", "", name, bar, make("span", "state"), again);
  }

  showRow(each) {
    const row = this.rows.get(each);
    if (!row) return;
    const [, bar, state, again] = row.children;
    row.className = each.state;
    bar.hidden = each.state === "failed";
    bar.value = each.share;
    again.hidden = each.state !== "failed" || each.isFinal;
    if (isSent(each)) bar.removeAttribute("value"); // nobody knows how long the scoring takes
    state.textContent = stateWords(each);
  }
}

const isSent = (each) => each.state === "sending" && each.share >= 1;

function stateWords(each) {
  if (each.state === "failed") return each.reason;
  if (each.state === "waiting") return say("upload_waiting");
  if (isSent(each)) return say("upload_scoring");
  return say("upload_sending", { percent: percent(each.share) });
}

// {files, unread} of a drop: its files, those in folders, too, but no hidden ones; and the names of
// what the browser could not read
export async function droppedFiles(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.());
  if (!entries.some(Boolean)) return { files: [...transfer.files], unread: [] };
  const found = { files: [], unread: [] };
  for (const entry of entries.filter(Boolean)) await readInto(found, entry);
  return found;
}

async function readInto(found, entry) {
  if (entry.name.startsWith(".")) return;
  try {
    if (entry.isFile) {
      found.files.push(await new Promise((done, fail) => entry.file(done, fail)));
      return;
    }
    const reader = entry.createReader();
    for (;;) {
      const some = await new Promise((done, fail) => reader.readEntries(done, fail));
      if (!some.length) return;
      for (const each of some) await readInto(found, each);
    }
  } catch {
    found.unread.push(entry.name);
  }
}
