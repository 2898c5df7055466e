// The words and numbers of the page, in its language.

const words = JSON.parse(document.getElementById("words").textContent);
export const language = document.documentElement.lang;

// [pattern of what the server says, the same in the page's language]
const reasons = JSON.parse(document.getElementById("reasons").textContent).map(
  ([said, text]) => [patternOf(said), text],
);

function patternOf(said) {
  const plain = said.replace(/[.*+?^$()|[\]\\]/g, "\\$&");
  return new RegExp(`^${plain.replace(/\{(\w+)\}/g, "(?<$1>.+?)")}$`, "s");
}

const plural = new Intl.PluralRules(language);
const whole = new Intl.NumberFormat(language, { maximumFractionDigits: 0 });
const shares = [0, 1].map(
  (digits) =>
    new Intl.NumberFormat(language, { style: "percent", maximumFractionDigits: digits }),
);
const clock = { hour: "2-digit", minute: "2-digit", hourCycle: "h23" };
const day = { day: "numeric", month: "short" };
const times = new Intl.DateTimeFormat(language, { ...day, ...clock });
const hours = new Intl.DateTimeFormat(language, clock);

// The words of this name, with values in their places; `n` chooses between _one and _other
export function say(name, values = {}) {
  const form = "n" in values ? `${name}_${plural.select(Number(values.n))}` : name;
  const text = words[form] ?? words[`${name}_other`] ?? words[name];
  if (text === undefined) throw new Error(`no words named ${name}`);
  return text.replace(/\{(\w+)\}/g, (_, key) => shown(values[key]));
}

function shown(value) {
  return typeof value === "number" ? whole.format(value) : value;
}

// 0.934 is 93 %; with one decimal near the ends, and never 0 or 100 % unless it is exactly that
export function percent(share, digits = share < 0.1 || share > 0.99 ? 1 : 0) {
  if (share === null || share === undefined || Number.isNaN(share)) return "–";
  if (share > 0 && share < 0.001) return `< ${shares[1].format(0.001)}`;
  if (share < 1 && share > 0.9995) return `> ${shares[1].format(0.999)}`;
  return shares[digits].format(share);
}

export const number = (value) => whole.format(value);

// A confidence interval in brackets, or nothing where there is none
export function rangeWords(interval) {
  if (!interval || interval[0] === null) return "";
  return ` (${percent(interval[0])}–${percent(interval[1])})`;
}

// What a model's figures were measured on
export function measuredWords({ numImages, split }) {
  return split ? say("measured_on", { n: numImages, split }) : say("not_measured");
}

// A time of day, with the date where that is another
export function time(text) {
  const date = new Date(text);
  const isToday = date.toDateString() === new Date().toDateString();
  return (isToday ? hours : times).format(date);
}

// A class or finding: as the data set names it, in other languages translated where it is known
export function nameWords(name) {
  if (language === "en") return name;
  const key = name.trim().toLowerCase().replace(/[\s_-]+/g, "_");
  return words[`name_${key}`] ?? name;
}

// Where a film came from
export const sourceWords = (source) => (source === "upload" ? say("source_upload") : source);

// What was called in a film, or that it is for review
export function decisionWords(film) {
  if (film.isReview) return say("review_yes");
  return film.decision.split("|").map(nameWords).join(", ");
}

// The server's message, which is in English, in the page's language where a translation is known
export function reasonWords(reason) {
  for (const [pattern, text] of reasons) {
    const found = pattern.exec(reason);
    if (!found) continue;
    const value = (key) => valueWords(key, found.groups[key]);
    return { text: text.replace(/\{(\w+)\}/g, (_, key) => value(key)), language };
  }
  return { text: reason, language: "en" };
}

function valueWords(key, value) {
  if (key === "why") return reasonWords(value).text;
  return /^\d+(\.\d+)?$/.test(value) ? Number(value).toLocaleString(language) : value;
}

// The same as a sentence about a film
export function reasonSentence(film) {
  const { text, language: spoken } = reasonWords(film.reason);
  return { text: say("reason_sentence", { reason: text }), language: spoken };
}
