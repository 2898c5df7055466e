// From a film's stored values to greys on the screen, by the linear window of DICOM PS3.3,
// C.11.2.1.2.1 (https://dicom.nema.org/medical/dicom/current/output/chtml/part03/).

const WHOLE_8_BITS = { centre: 128, width: 256 }; // every value as it is

// What `Viewer.open` needs besides the pixels, from an image and the server's account of its values
export function ownWindow(image, said) {
  const { slope = 1, intercept = 0, centre, width, isInverse = false } = said;
  const scale = { slope, intercept, isInverse };
  const [low, high] = valueRange(image, scale);
  if (centre !== undefined && width >= 1) return { ...scale, centre, width, low, high };
  if (image.bits === 8) return { ...scale, ...WHOLE_8_BITS, low: 0, high: 255 };
  return { ...scale, centre: (low + high + 1) / 2, width: high - low + 1, low, high };
}

// The lowest and the highest value of a film, in the units of its window
function valueRange({ pixels }, { slope, intercept }) {
  let [low, high] = [Infinity, -Infinity];
  for (let i = 0; i < pixels.length; i += 1) {
    if (pixels[i] < low) low = pixels[i];
    if (pixels[i] > high) high = pixels[i];
  }
  const ends = [slope * low + intercept, slope * high + intercept];
  return [Math.min(...ends), Math.max(...ends)];
}

// The pixel (as ImageData holds it) of each stored value
export function greyTable(bits, own, { centre, width }, isInverted) {
  const table = new Uint32Array(2 ** bits);
  const isFlipped = own.isInverse !== isInverted;
  for (let stored = 0; stored < table.length; stored += 1) {
    const value = own.slope * stored + own.intercept;
    // a window of width 1 is a step
    const place = width > 1 ? (value - (centre - 0.5)) / (width - 1) + 0.5 : +(value >= centre);
    const grey = Math.round(255 * Math.min(1, Math.max(0, place)));
    const shown = isFlipped ? 255 - grey : grey;
    table[stored] = (0xff000000 | (shown << 16) | (shown << 8) | shown) >>> 0;
  }
  return table;
}
