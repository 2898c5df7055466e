// Reads grey PNG files with all of their 16 bits, of which a browser's own decoder keeps 8.
// PNG specification, third edition: https://www.w3.org/TR/png-3/

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];

// The grey values of a PNG file (an ArrayBuffer): {width, height, bits, pixels}, where pixels is a
// Uint8Array or a Uint16Array, row by row. Throws an Error for what is no grey PNG.
export async function readPng(buffer) {
  const header = readHeader(buffer);
  const { width, height, bits } = header;
  const size = bits / 8;
  const stride = width * size;
  const raw = await inflate(header.parts);
  if (raw.length !== height * (stride + 1)) throw new Error("the PNG file is cut off");
  const rows = unfilter(raw, height, stride, size);
  if (bits === 8) return { width, height, bits, pixels: rows };
  const pixels = new Uint16Array(width * height);
  for (let i = 0; i < pixels.length; i += 1) pixels[i] = (rows[2 * i] << 8) | rows[2 * i + 1];
  return { width, height, bits, pixels };
}

function readHeader(buffer) {
  const view = new DataView(buffer);
  const bytes = new Uint8Array(buffer);
  if (SIGNATURE.some((byte, i) => bytes[i] !== byte)) throw new Error("this is no PNG file");
  const parts = [];
  let header = null;
  for (let at = 8; at + 8 <= bytes.length; ) {
    const length = view.getUint32(at);
    const type = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    const body = at + 8;
    if (type === "IHDR") {
      const [bits, colour, , , interlace] = bytes.subarray(body + 8, body + 13);
      header = { width: view.getUint32(body), height: view.getUint32(body + 4), bits };
      if (colour !== 0 || interlace !== 0 || (bits !== 8 && bits !== 16)) {
        throw new Error("this PNG file is not grey with 8 or 16 bits");
      }
    }
    if (type === "IDAT") parts.push(bytes.subarray(body, body + length));
    if (type === "IEND") break;
    at = body + length + 4; // and the checksum
  }
  if (!header) throw new Error("this PNG file has no header");
  return { ...header, parts };
}

async function inflate(parts) {
  const stream = new Blob(parts).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Undoes the filter that each row begins with (section 9); `size` is the bytes of a pixel
function unfilter(raw, height, stride, size) {
  const out = new Uint8Array(height * stride);
  for (let row = 0; row < height; row += 1) {
    const from = row * (stride + 1);
    const line = raw.subarray(from + 1, from + 1 + stride);
    const to = out.subarray(row * stride, (row + 1) * stride);
    const above = row ? out.subarray((row - 1) * stride, row * stride) : new Uint8Array(stride);
    unfilterRow(raw[from], line, to, above, size);
  }
  return out;
}

function unfilterRow(filter, line, to, above, size) {
  const { length } = line;
  if (filter === 0) {
    to.set(line);
  } else if (filter === 1) {
    for (let i = 0; i < length; i += 1) to[i] = line[i] + (i < size ? 0 : to[i - size]);
  } else if (filter === 2) {
    for (let i = 0; i < length; i += 1) to[i] = line[i] + above[i];
  } else if (filter === 3) {
    for (let i = 0; i < length; i += 1) {
      to[i] = line[i] + (((i < size ? 0 : to[i - size]) + above[i]) >> 1);
    }
  } else if (filter === 4) {
    for (let i = 0; i < length; i += 1) {
      const left = i < size ? 0 : to[i - size];
      const corner = i < size ? 0 : above[i - size];
      to[i] = line[i] + paeth(left, above[i], corner);
    }
  } else {
    throw new Error(`the PNG file has a row with filter ${filter}`);
  }
}

function paeth(left, above, corner) {
  const guess = left + above - corner;
  const a = Math.abs(guess - left);
  const b = Math.abs(guess - above);
  const c = Math.abs(guess - corner);
  if (a <= b && a <= c) return left;
  return b <= c ? above : corner;
}
