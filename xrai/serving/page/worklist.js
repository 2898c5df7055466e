// The list of films: filters, selection, one row for each film.

import { callMark, find, make, meter } from "./dom.js";
import { decisionWords, nameWords, percent, reasonWords, say, sourceWords, time } from "./words.js";

const FILTERS = ["text", "review", "decision", "source"];
const control = (name) => find(`filter-${name}`);

export class Worklist {
  // `onSelect(film)`, `onOpen(film)` and `onFilter(filters)` are called when a person does so
  constructor(filters, { onSelect, onOpen, onFilter }) {
    this.films = [];
    this.numWaiting = 0; // more films, which are being scored
    this.shown = []; // those that the filters let through
    this.rows = new Map(); // element and text of each shown film, by id
    this.filters = filters;
    this.selected = ""; // id
    this.onSelect = onSelect;
    this.onOpen = onOpen;
    this.onFilter = onFilter;
    this.isLoaded = false;
    for (const name of FILTERS) {
      const input = control(name);
      input.value = filters[name];
      input.addEventListener("input", () => this.setFilters({ [name]: input.value }));
    }
    find("filters").addEventListener("submit", (event) => event.preventDefault());
    find("clear").addEventListener("click", () => this.clearFilters());
    find("rows").addEventListener("click", (event) => this.click(event));
  }

  // Films in the order of the list
  show(films, numWaiting) {
    this.films = films;
    this.numWaiting = numWaiting;
    this.isLoaded = true;
    this.fillChoices();
    this.refresh();
  }

  setFilters(changes) {
    this.filters = { ...this.filters, ...changes };
    this.refresh();
    this.onFilter(this.filters);
  }

  clearFilters() {
    this.setFilters(Object.fromEntries(FILTERS.map((name) => [name, ""])));
    for (const name of FILTERS) control(name).value = "";
    control("text").focus();
  }

  fillChoices() {
    const decisions = this.films.filter((film) => !film.isReview).map(decisionWords);
    fill("decision", decisions, this.filters.decision);
    fill("source", this.films.map((film) => sourceWords(film.source)), this.filters.source);
  }

  passes(film) {
    const { text, review, decision, source } = this.filters;
    const reason = reasonWords(film.reason).text;
    const words = `${film.name} ${film.reason} ${reason}`.toLocaleLowerCase();
    return (
      (!text || words.includes(text.toLocaleLowerCase())) &&
      (!review || film.isReview === (review === "yes")) &&
      (!decision || (!film.isReview && decisionWords(film) === decision)) &&
      (!source || sourceWords(film.source) === source)
    );
  }

  refresh() {
    this.shown = this.films.filter((film) => this.passes(film));
    const hasFilms = this.films.length > 0;
    const isFiltered = FILTERS.some((name) => this.filters[name]);
    find("filters").hidden = !hasFilms && !isFiltered;
    find("summary").hidden = !hasFilms && !this.numWaiting;
    find("sorted").hidden = !hasFilms;
    find("csv").hidden = !hasFilms;
    find("rows").hidden = !this.shown.length;
    find("none").hidden = !hasFilms || this.shown.length > 0;
    find("empty").hidden = hasFilms || this.numWaiting > 0 || !this.isLoaded;
    find("clear").hidden = !isFiltered;
    find("count").textContent = this.countWords(isFiltered);
    this.drawRows();
  }

  countWords(isFiltered) {
    const [n, all] = [this.shown.length, this.films.length];
    const numReview = this.shown.filter((film) => film.isReview).length;
    const count = isFiltered ? say("count_filtered", { n, all }) : say("count", { n });
    const review = numReview ? say("num_review", { n: numReview }) : "";
    const waiting = this.numWaiting ? say("num_waiting", { n: this.numWaiting }) : "";
    return [count, review, waiting].filter(Boolean).join(" · ");
  }

  drawRows() {
    const rows = this.shown.map((film) => this.rows.get(film.id) ?? makeRow(film));
    this.rows = new Map(this.shown.map((film, i) => [film.id, rows[i]]));
    const list = find("rows");
    rows.forEach((row, i) => {
      if (list.children[i] !== row) list.insertBefore(row, list.children[i] ?? null);
    });
    while (list.children.length > rows.length) list.lastChild.remove();
    this.mark();
  }

  // ----------------------------------------------------------------------------------- selection

  click(event) {
    const row = event.target.closest(".row");
    const film = row && this.shown.find((each) => each.id === row.dataset.id);
    if (!film) return;
    this.select(film.id);
    this.onOpen(film);
  }

  select(id) {
    this.selected = id;
    this.mark();
    if (this.film) this.onSelect(this.film);
    this.showSelected();
  }

  showSelected() {
    this.rows.get(this.selected)?.scrollIntoView({ block: "nearest" });
  }

  // The selected film, if it is shown
  get film() {
    return this.shown.find((each) => each.id === this.selected);
  }

  get place() {
    return this.shown.findIndex((each) => each.id === this.selected);
  }

  // Selects the film `step` places further, at most the first or the last one
  move(step) {
    if (!this.shown.length) return;
    const to = this.place < 0 ? 0 : this.place + step;
    this.select(this.shown[Math.max(0, Math.min(this.shown.length - 1, to))].id);
  }

  mark() {
    for (const [id, row] of this.rows) row.ariaSelected = String(id === this.selected);
    const row = this.rows.get(this.selected);
    if (row) find("rows").setAttribute("aria-activedescendant", row.id);
    else find("rows").removeAttribute("aria-activedescendant");
  }
}

function fill(name, values, chosen) {
  const texts = [...new Set([...values, ...(chosen ? [chosen] : [])])].sort();
  const all = make("option", "", say("any"));
  all.value = "";
  const options = texts.map((text) => make("option", "", text));
  const select = control(name);
  const there = [...select.options].map((each) => each.value);
  if (there.join("\n") === ["", ...texts].join("\n")) return;
  select.replaceChildren(all, ...options);
  select.value = chosen;
}

function makeRow(film) {
  const row = make("div", film.isReview ? "row uncertain" : "row");
  row.role = "option";
  row.id = `row-${film.id}`;
  row.dataset.id = film.id;
  const words = decisionWords(film);
  row.ariaLabel = say("row", { name: film.name, decision: words, score: spoken(film) });
  row.append(thumbnail(film), who(film), score(film, words));
  return row;
}

function scored({ listed }) {
  return listed ? `${nameWords(listed.name)} ${percent(listed.probability)}` : "";
}

function spoken(film) {
  const reason = film.reason ? reasonWords(film.reason).text : "";
  return [scored(film) || say("no_score"), reason].filter(Boolean).join(". ");
}

function thumbnail(film) {
  if (!film.hasImage) return make("span", "thumb", "?");
  const image = make("img", "thumb");
  image.alt = "";
  image.loading = "lazy";
  image.src = film.addresses.thumbnail;
  return image;
}

function who(film) {
  const name = make("span", "name", film.name);
  name.dir = "auto";
  name.title = film.name;
  const about = make("span", "about", [sourceWords(film.source), time(film.received)].join(" · "));
  const found = make("span", "who", name, about);
  if (film.reason) {
    const reason = reasonWords(film.reason);
    const element = make("span", "reason", reason.text);
    element.lang = reason.language;
    element.title = reason.text;
    found.append(element);
  }
  return found;
}

function score(film, words) {
  const mark = callMark(film.isReadable ? words : say("unreadable"), film);
  const found = make("span", "score", mark);
  if (!film.listed) return found;
  const { name, probability, threshold, isCalled } = film.listed;
  const bar = make("span", "measure", meter(probability, threshold, isCalled));
  if (Object.keys(film.probabilities).length > 1) {
    bar.classList.add("named");
    bar.prepend(make("span", "of", nameWords(name)));
  }
  bar.append(make("span", "percent", percent(probability)));
  bar.title = scored(film);
  found.append(bar);
  return found;
}
