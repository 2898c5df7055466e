// What is said of one film: the call, every class or finding, what a threshold means, the facts.

import { callMark, find, make, meter } from "./dom.js";
import { keep, settings } from "./state.js";
import {
  decisionWords,
  measuredWords,
  nameWords,
  number,
  percent,
  rangeWords,
  reasonSentence,
  say,
  sourceWords,
  time,
} from "./words.js";

// Steps of the slider: finer where diseases are rare
const LOWEST = 0.001;
const HIGHEST = 0.9;
const toShare = (step) => LOWEST * (HIGHEST / LOWEST) ** (step / 100);
const toStep = (share) => (100 * Math.log(share / LOWEST)) / Math.log(HIGHEST / LOWEST);
const clamped = (share) => Math.min(HIGHEST, Math.max(LOWEST, share));

// Where nobody has set one: the server's prior, which the probabilities beside it hold for, or else
// that of the images that the model was measured on; null where neither is known
const usualPrevalence = ({ prior, prevalence }) => prior ?? prevalence;

// PPV and NPV at a prevalence (Bayes), of {sensitivity, specificity}; null where undefined
export function predictiveValues({ sensitivity, specificity }, prevalence) {
  const truePositive = prevalence * sensitivity;
  const falsePositive = (1 - prevalence) * (1 - specificity);
  const trueNegative = (1 - prevalence) * specificity;
  const falseNegative = prevalence * (1 - sensitivity);
  const ratio = (part, rest) => (part + rest > 0 ? part / (part + rest) : null);
  return { ppv: ratio(truePositive, falsePositive), npv: ratio(trueNegative, falseNegative) };
}

// The same at the ends of both intervals
function rangesAt({ intervals }, prevalence) {
  const { sensitivity, specificity } = intervals ?? {};
  if (!isKnown(sensitivity) || !isKnown(specificity)) return { "ppv-range": "", "npv-range": "" };
  const ends = [0, 1].map((end) => {
    const rates = { sensitivity: sensitivity[end], specificity: specificity[end] };
    return predictiveValues(rates, prevalence);
  });
  const between = (key) => {
    const [low, high] = ends.map((each) => percent(each[key]));
    return say("between", { low, high });
  };
  return { "ppv-range": between("ppv"), "npv-range": between("npv") };
}

const isKnown = (interval) => Boolean(interval) && interval[0] !== null && interval[1] !== null;

export class Reading {
  // `onOutput(name)` is called when a person chooses a class or finding
  constructor(onOutput) {
    this.model = null; // which scored the films, as `fetchModel` gives it
    this.onOutput = onOutput;
    this.film = null;
    find("prevalence").addEventListener("input", () => {
      this.setPrevalence(toShare(Number(find("prevalence").value)));
    });
    find("prevalence-reset").addEventListener("click", () => this.setPrevalence(null));
  }

  show(film) {
    this.film = film;
    this.showVerdict();
    this.showWhy();
    this.showOutputs();
    this.showFacts();
    this.choose(this.chosen);
  }

  // The selected class or finding: the one chosen last, else the film's most probable one
  get chosen() {
    const names = Object.keys(this.film.probabilities);
    if (names.includes(settings.output)) return settings.output;
    return this.film.top?.name ?? "";
  }

  choose(name) {
    for (const input of find("outputs").querySelectorAll("input")) {
      input.checked = input.value === name;
    }
    this.showMeaning(this.model.outputs.find((each) => each.name === name));
  }

  showVerdict() {
    const { film } = this;
    const words = film.isReadable || !film.isReview ? decisionWords(film) : say("unreadable");
    find("verdict").replaceChildren(callMark(words, film));
    const shown = film.called ?? film.top;
    if (!shown) return;
    const text = [`${nameWords(shown.name)} ${percent(shown.probability)}`];
    if (shown.threshold !== null) {
      text.push(say("threshold_at", { value: percent(shown.threshold) }));
    }
    find("verdict").append(make("p", "", text.join(" · ")));
  }

  showWhy() {
    const { film } = this;
    const why = find("why");
    why.hidden = !film.isReview;
    if (!film.isReview) return;
    const reason = reasonSentence(film);
    const [title, words, meaning] = why.children;
    title.textContent = say("why_review");
    words.textContent = reason.text;
    words.lang = reason.language;
    meaning.textContent = say(film.isReadable ? "review_meaning" : "unreadable_meaning");
  }

  showOutputs() {
    const { film } = this;
    find("outputs-part").hidden = !film.isReadable;
    const names = Object.keys(film.probabilities);
    names.sort((a, b) => film.probabilities[b] - film.probabilities[a]);
    find("outputs").replaceChildren(...names.map((name) => this.makeOutput(name)));
  }

  makeOutput(name) {
    const { film } = this;
    const probability = film.probabilities[name];
    const threshold = film.thresholds[name] ?? null;
    const isCalled = threshold === null ? film.calls.includes(name) : probability >= threshold;
    const input = make("input");
    Object.assign(input, { type: "radio", name: "output", value: name });
    input.addEventListener("change", () => this.onOutput(name));
    const line = make("span", "top-line", make("b", "", nameWords(name)));
    line.append(make("span", "percent", percent(probability)));
    const words = [];
    if (threshold !== null) words.push(say("threshold_at", { value: percent(threshold) }));
    if (isCalled) words.push(say(threshold === null ? this.classWords : "called"));
    const small = make("small", "", words.join(" · "));
    return make("label", "output", input, line, meter(probability, threshold, isCalled), small);
  }

  // A prior moves probabilities, not calls: the class called may not be the most probable one
  get classWords() {
    return Object.keys(this.film.prior).length ? "called_at_prior" : "called_class";
  }

  // --------------------------------------------------------------------------- what it is worth

  prevalenceOf(output) {
    return settings.prevalence[output.name] ?? usualPrevalence(output) ?? 0.1;
  }

  setPrevalence(share) {
    const output = this.output;
    const { [output.name]: _, ...others } = settings.prevalence;
    keep({ prevalence: share === null ? others : { ...others, [output.name]: share } });
    this.showMeaning(output);
  }

  showMeaning(output) {
    this.output = output;
    const isMeasured = output && output.sensitivity !== null && output.specificity !== null;
    const isShown = isMeasured && this.film.isReadable && this.film.model === this.model.run;
    find("meaning").hidden = !isShown;
    if (!isShown) return;
    const prevalence = this.prevalenceOf(output);
    const { ppv, npv } = predictiveValues(output, prevalence);
    const name = nameWords(output.name);
    const of = (key, value) =>
      value === null ? "" : say(key, { name, n: Math.round(100 * value) });
    const texts = {
      "meaning-title": say("meaning_of", { name }),
      "prevalence-label": say("prevalence", { name }),
      "prevalence-value": percent(prevalence),
      ppv: percent(ppv),
      npv: percent(npv),
      ...rangesAt(output, prevalence),
      "ppv-words": of("ppv_words", ppv),
      "npv-words": of("npv_words", npv),
      "rates-words": this.ratesWords(output),
    };
    for (const [id, text] of Object.entries(texts)) find(id).textContent = text;
    const slider = find("prevalence");
    slider.value = toStep(clamped(prevalence));
    slider.setAttribute("aria-valuetext", say("prevalence_is", { percent: percent(prevalence) }));
    const reset = find("prevalence-reset");
    const usual = usualPrevalence(output);
    const isOwn = output.name in settings.prevalence;
    reset.hidden = !isOwn || usual === null;
    find("prevalence-usual").hidden = isOwn || usual === null;
    if (usual !== null) {
      const isMeasured = output.prior === null;
      const back = isMeasured ? "prevalence_reset_measured" : "prevalence_reset_prior";
      find("prevalence-usual").textContent = say(
        isMeasured ? "prevalence_measured" : "prevalence_prior",
      );
      reset.textContent = say(back, { percent: percent(usual) });
    }
  }

  ratesWords(output) {
    const rates = ["sensitivity", "specificity"].map(
      (key) => `${say(key)} ${percent(output[key])}${rangeWords(output.intervals?.[key])}`,
    );
    return `${rates.join(", ")}. ${measuredWords(this.model)}`;
  }

  showFacts() {
    const { film } = this;
    const facts = [];
    if (film.width) facts.push([say("size"), `${number(film.width)} × ${number(film.height)}`]);
    facts.push([say("source"), sourceWords(film.source)], [say("received"), time(film.received)]);
    if (film.expires) facts.push([say("expires"), time(film.expires)]);
    facts.push([say("scored_by"), film.model]);
    if (film.disagreement !== null) {
      const apart = say("at_most", { percent: percent(film.disagreement) });
      facts.push([say("disagreement"), apart]);
    }
    const parts = facts.flatMap(([what, text]) => [make("dt", "", what), make("dd", "", text)]);
    find("facts").replaceChildren(...parts);
  }
}
