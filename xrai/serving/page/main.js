// The ward's page: brings together the list, the uploads, the viewer and the keyboard.

import {
  deleteFilm,
  fetchAhead,
  fetchFilms,
  fetchModel,
  loadHeat,
  loadImage,
  upload,
} from "./api.js";
import { showCard } from "./card.js";
import { announce, find, make } from "./dom.js";
import { listenToKeys } from "./keys.js";
import { Reading } from "./reading.js";
import { keep, readAddress, settings, writeAddress } from "./state.js";
import { droppedFiles, Uploads } from "./uploads.js";
import { Viewer } from "./viewer.js";
import { decisionWords, nameWords, number, percent, reasonSentence, say } from "./words.js";
import { ownWindow } from "./window.js";
import { Worklist } from "./worklist.js";

const POLL_MS = 4000;
const SOONEST_MS = 1000; // between two requests for the list while films come in

class Ward {
  constructor(model) {
    this.answered = 0; // when the list last arrived, as Date.now gives it
    this.unshown = null; // a list that arrived, but not the model that scored its films
    this.open = null; // the film shown next to the list
    this.hasFailed = false; // whether its image could not be loaded
    const { film, ...filters } = readAddress();
    this.wanted = film; // the film in the address, until the list has arrived
    this.viewer = new Viewer(find("canvas"), () => this.viewChanged());
    this.reading = new Reading((name) => this.chooseOutput(name));
    this.list = new Worklist(filters, {
      onSelect: (selected) => this.selected(selected),
      onOpen: (chosen) => this.openFilm(chosen, true),
      onFilter: () => this.writeAddress(),
    });
    this.list.selected = settings.selected;
    this.use(model);
    this.uploads = new Uploads(upload, () => this.pollIn(SOONEST_MS));
    this.listen();
    this.setTool(settings.tool);
    this.setInverted(settings.invert);
    this.showHeatButton();
    this.setOpacity(settings.opacity);
  }

  // ------------------------------------------------------------------------------------ the list

  use(model) {
    this.model = model;
    this.reading.model = model;
    const names = model.outputs.map((output) => nameWords(output.name));
    find("looks-for").textContent = names.join(", ");
    find("phantoms").hidden = !model.isPhantom;
  }

  // Asks for the list this long after the last answer, and again after each one
  pollIn(pause) {
    const since = Date.now() - this.answered;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.poll(), Math.max(0, pause - since));
  }

  // Asks for the list; one request at a time
  async poll() {
    if (this.isAsking) {
      this.isAskedAgain = true;
      return;
    }
    this.isAsking = true;
    this.isAskedAgain = false;
    try {
      const found = (await fetchFilms()) ?? this.unshown;
      this.unshown = found;
      if (found) {
        await this.followModel(found.films);
        this.showFilms(found);
        this.unshown = null;
      }
      find("offline").hidden = true;
    } catch (error) {
      showOffline(error, this.uploads.hasUnsent);
    }
    this.isAsking = false;
    this.answered = Date.now();
    this.pollIn(this.isAskedAgain || this.list.numWaiting ? SOONEST_MS : POLL_MS);
  }

  // The server may have loaded another run since the page was opened
  async followModel(films) {
    const [newest] = [...films].sort((a, b) => Date.parse(b.received) - Date.parse(a.received));
    if (newest && newest.model !== this.model.run) this.use(await fetchModel());
  }

  showFilms({ films, numWaiting }) {
    this.list.show(films, numWaiting);
    const wanted = this.wanted && films.find((film) => film.id === this.wanted);
    this.wanted = "";
    if (wanted) {
      this.list.select(wanted.id);
      this.openFilm(wanted, false);
    }
    if (this.open && !films.some((film) => film.id === this.open.id)) {
      this.showMessage(say("film_gone"));
    }
    this.showPlace();
  }

  selected(film) {
    keep({ selected: film.id });
    if (this.open && this.open.id !== film.id) this.openFilm(film, false);
  }

  writeAddress(isStep = false) {
    writeAddress({ ...this.list.filters, film: this.open?.id ?? "" }, isStep);
  }

  // ------------------------------------------------------------------------------------- one film

  async openFilm(film, isStep) {
    const isNew = !this.open;
    if (this.open?.id === film.id && !this.hasFailed) return;
    this.open = film;
    this.hasFailed = false;
    clearTimeout(this.keepTimer);
    const kept = settings.view?.film === film.id ? settings.view : null;
    document.body.classList.add("is-open");
    find("film").hidden = false;
    find("film-name").textContent = film.name;
    this.reading.show(film);
    this.showPlace();
    this.list.showSelected();
    this.writeAddress(isStep && isNew);
    if (isNew && isStep) find("film-name").focus();
    announce(`${film.name}: ${decisionWords(film)}`);
    this.viewer.close();
    find("stage-heat").textContent = "";
    find("delete").disabled = false;
    find("delete-failed").hidden = true;
    find("image-controls").hidden = !film.hasImage;
    for (const tool of find("tools").children) tool.disabled = !film.hasImage;
    if (!film.hasImage) {
      this.showMessage(reasonSentence(film).text);
      return;
    }
    this.showMessage(say("loading"));
    try {
      const image = await loadImage(film);
      if (this.open !== film) return;
      this.viewer.open(image, ownWindow(image, film.values), kept);
      this.showMessage("");
      this.describeCanvas();
      this.setWindowRanges();
      await this.showHeat();
      const next = this.list.shown[this.list.place + 1];
      if (this.open === film && next?.hasImage) fetchAhead(next);
    } catch (error) {
      if (this.open !== film) return;
      this.hasFailed = true;
      this.showMessage(say("film_failed", { reason: error.message }));
    }
  }

  closeFilm(isStep = true) {
    if (!this.open) return;
    this.open = null;
    this.viewer.close();
    document.body.classList.remove("is-open");
    find("film").hidden = true;
    this.writeAddress(isStep);
    this.list.select(this.list.selected);
    find("rows").focus();
  }

  showPlace() {
    const { place, shown } = this.list;
    const words = say("place", { n: place + 1, all: shown.length });
    find("film-place").textContent = place < 0 ? "" : words;
    find("previous").disabled = place <= 0;
    find("next").disabled = place < 0 || place >= shown.length - 1;
  }

  showMessage(text) {
    find("stage-message").textContent = text;
    find("stage-message").hidden = !text;
  }

  describeCanvas() {
    const { name, width, height } = this.open;
    const values = { name, width, height, decision: decisionWords(this.open) };
    find("canvas").ariaLabel = say("canvas", values);
  }

  async deleteOpen() {
    const film = this.open;
    if (!film) return;
    find("confirm-name").textContent = film.name;
    if ((await ask(find("confirm"))) !== "yes") return;
    const { shown, place } = this.list;
    const next = shown[place + 1] ?? shown[place - 1];
    find("delete-failed").hidden = true;
    try {
      await deleteFilm(film);
    } catch (error) {
      if (this.open === film) showDeleteFailed(error);
      return;
    }
    announce(say("deleted"));
    if (this.open === film) {
      if (next) this.list.select(next.id);
      else this.closeFilm();
    }
    await this.poll();
  }

  // ----------------------------------------------------------------- window, zoom, tools, heat map

  viewChanged() {
    const { viewer } = this;
    if (!viewer.film) {
      find("stage-words").textContent = "";
      return;
    }
    const { centre, width } = viewer.window;
    const words = [
      say("window_short", { centre, width }),
      say("zoom_short", { percent: percent(viewer.view.scale * devicePixelRatio, 0) }),
    ];
    if (viewer.isInverted) words.push(say("inverted"));
    find("stage-words").textContent = words.join(" · ");
    for (const [id, value] of [["window-centre", centre], ["window-width", width]]) {
      find(id).value = value;
      find(`${id}-value`).textContent = number(value);
    }
    clearTimeout(this.keepTimer);
    const film = this.open;
    this.keepTimer = setTimeout(() => {
      if (this.open === film) keep({ view: { film: film.id, ...viewer.kept } });
    }, 200);
  }

  setWindowRanges() {
    const { low, high, centre, width } = this.viewer.film.own;
    const range = Math.max(high - low + 1, width);
    const step = range > 1000 ? 1 : 0.5;
    const ends = { min: Math.min(low, centre), max: Math.max(high, centre), step };
    Object.assign(find("window-centre"), ends);
    Object.assign(find("window-width"), { min: 1, max: range, step });
    this.viewChanged();
  }

  setTool(tool) {
    this.viewer.tool = tool;
    keep({ tool });
    find("canvas").classList.toggle("panning", tool === "pan");
    for (const each of ["window", "pan"]) find(`tool-${each}`).ariaPressed = String(each === tool);
  }

  setInverted(invert) {
    keep({ invert });
    find("invert").ariaPressed = String(invert);
    this.viewer.setInverted(invert);
  }

  setOpacity(opacity) {
    keep({ opacity });
    find("opacity").value = opacity;
    find("opacity-value").textContent = percent(opacity / 100);
    this.viewer.setOpacity(opacity / 100);
  }

  resetView() {
    if (!this.viewer.film) return;
    this.viewer.resetWindow();
    this.viewer.fit();
    this.setInverted(false);
  }

  showHeatButton() {
    find("heat").ariaPressed = String(settings.heat);
  }

  toggleHeat() {
    keep({ heat: !settings.heat });
    this.showHeatButton();
    this.showHeat();
  }

  chooseOutput(name) {
    keep({ output: name });
    this.reading.choose(name);
    this.showHeat();
  }

  nextOutput() {
    const names = [...find("outputs").querySelectorAll("input")].map((each) => each.value);
    if (!this.open || names.length < 2) return;
    this.chooseOutput(names[(names.indexOf(this.reading.chosen) + 1) % names.length]);
    announce(nameWords(this.reading.chosen));
  }

  async showHeat() {
    const film = this.open;
    if (!film?.isReadable || !film.hasImage) return;
    const name = this.reading.chosen;
    const isStill = () => this.open === film && settings.heat && this.reading.chosen === name;
    find("stage-heat").textContent = "";
    this.viewer.setHeat(null);
    if (!settings.heat) return;
    try {
      const heat = await loadHeat(film, name);
      if (!isStill()) return;
      this.viewer.setHeat(heat);
      const words = [say("heat_of", { name: nameWords(name) }), say("heat_meaning")];
      find("stage-heat").textContent = words.join(". ");
      announce(words[0]);
    } catch {
      if (isStill()) find("stage-heat").textContent = say("heat_failed");
    }
  }

  // ----------------------------------------------------------------------------------- listening

  listen() {
    const on = (id, act, name = "click") => find(id).addEventListener(name, act);
    const { viewer } = this;
    for (const id of ["choose", "choose-first"]) on(id, () => find("files").click());
    on("files", () => this.addFiles([...find("files").files]), "change");
    on("back", () => this.closeFilm());
    on("previous", () => this.list.move(-1));
    on("next", () => this.list.move(1));
    on("delete", () => this.deleteOpen());
    on("tool-window", () => this.setTool("window"));
    on("tool-pan", () => this.setTool("pan"));
    on("zoom-in", () => viewer.zoomBy(1.25));
    on("zoom-out", () => viewer.zoomBy(0.8));
    on("fit", () => viewer.film && viewer.fit());
    on("actual", () => viewer.actualSize());
    on("invert", () => this.setInverted(!settings.invert));
    on("heat", () => this.toggleHeat());
    on("reset", () => this.resetView());
    on("opacity", () => this.setOpacity(Number(find("opacity").value)), "input");
    for (const id of ["window-centre", "window-width"]) on(id, () => this.slideWindow(), "input");
    on("open-card", () => showCard(this.model));
    on("open-help", () => this.showHelp());
    on("keys-on", () => keep({ keys: find("keys-on").checked }), "change");
    for (const link of document.querySelectorAll(".languages a")) {
      link.addEventListener("click", () => keepFilters(link));
    }
    on("theme", () => setTheme(find("theme").value), "change");
    for (const button of document.querySelectorAll("[data-close]")) {
      button.addEventListener("click", () => button.closest("dialog").close());
    }
    addEventListener("popstate", () => this.followAddress());
    document.addEventListener("visibilitychange", () => document.hidden || this.poll());
    this.listenToDrops();
    listenToKeys(this);
  }

  addFiles(files) {
    this.uploads.add(files);
    find("files").value = "";
  }

  listenToDrops() {
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    addEventListener("dragover", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      find("drop").hidden = false;
    });
    addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) find("drop").hidden = true;
    });
    addEventListener("drop", async (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      find("drop").hidden = true;
      const { files, unread } = await droppedFiles(event.dataTransfer);
      this.uploads.add(files, unread);
    });
  }

  slideWindow() {
    const value = (id) => Number(find(id).value);
    this.viewer.setWindow(value("window-centre"), value("window-width"));
  }

  showHelp() {
    find("keys-on").checked = settings.keys;
    find("help").showModal();
  }

  // After the browser's back or forward button
  followAddress() {
    const { film } = readAddress();
    const found = this.list.films.find((each) => each.id === film);
    if (!found) {
      this.closeFilm(false);
      return;
    }
    this.list.select(found.id);
    this.openFilm(found, false);
  }
}

// A change of language keeps the filters and the open film
function keepFilters(link) {
  const asked = new URLSearchParams(location.search);
  asked.set("lang", link.lang);
  link.search = asked;
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  document.cookie = `xrai_theme=${theme}; path=/; max-age=31536000; samesite=strict`;
}

// Says that the list cannot be asked for. After the session's end, a reload leads to the login; with
// files that are not sent yet, which a reload would lose, a link does.
function showOffline(error, hasUnsent = false) {
  const element = find("offline");
  const what = !error.isLogin ? "offline" : hasUnsent ? "login_ended_uploads" : "login_ended";
  if (element.hidden || element.dataset.what !== what) {
    element.dataset.what = what; // screen readers would read the same words out at each request
    element.replaceChildren(say(what));
    if (what === "login_ended_uploads") element.append(" ", loginLink());
    element.hidden = false;
  }
  if (error.isLogin && !hasUnsent) location.reload();
}

function loginLink() {
  return Object.assign(make("a", "", say("login_new_tab")), { href: "/login", target: "_blank" });
}

function showDeleteFailed(error) {
  const reason = error.isAnswer ? error.message : say("upload_lost");
  const words = error.isLogin ? say("login_ended") : say("delete_failed", { reason });
  find("delete-failed").textContent = words;
  find("delete-failed").hidden = false;
}

// What a person answers in a dialog
function ask(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((done) => {
    dialog.addEventListener("close", () => done(dialog.returnValue), { once: true });
  });
}

// The model, asked for until the server gives it
async function firstModel() {
  for (;;) {
    try {
      return await fetchModel();
    } catch (error) {
      showOffline(error);
    }
    await new Promise((done) => setTimeout(done, POLL_MS));
  }
}

const ward = new Ward(await firstModel());
await ward.poll();
