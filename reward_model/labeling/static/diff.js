// Which words two texts share. The longest common subsequence, by dynamic programming; too long for that by words,
// it is sought by lines, and too long for that as well, all counts as different. So the time is bounded.

const MAX_CELLS = 4_000_000;

/** Two lists of {text, same}, whose texts add up to `left` and to `right`. */
export function wordDiff(left, right) {
  for (const split of [words, lines]) {
    const [a, b] = [split(left), split(right)];
    const found = common(a, b);
    if (found) return [runs(a, found[0]), runs(b, found[1])];
  }
  return [[{ text: left, same: false }], [{ text: right, same: false }]];
}

/** Words of any script, with the spaces and marks between them. */
function words(text) {
  const segmenter = new Intl.Segmenter(undefined, { granularity: "word" });
  return Array.from(segmenter.segment(text), (part) => part.segment);
}

function lines(text) {
  return text.split(/(?<=\n)/);
}

/** For each token of `a` and of `b`, whether it belongs to the longest common subsequence; null if that is too much. */
function common(a, b) {
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start += 1;
  let end = 0;
  const rest = Math.min(a.length, b.length) - start;
  while (end < rest && a[a.length - 1 - end] === b[b.length - 1 - end]) end += 1;
  const [n, m] = [a.length - start - end, b.length - start - end];
  if ((n + 1) * (m + 1) > MAX_CELLS) return null;
  // length[i, j]: of the longest one in a[i:] and b[j:] of the middle parts
  const width = m + 1;
  const length = new Uint16Array((n + 1) * width);
  for (let i = n - 1; i >= 0; i -= 1) {
    for (let j = m - 1; j >= 0; j -= 1) {
      const at = i * width + j;
      if (a[start + i] === b[start + j]) length[at] = length[at + width + 1] + 1;
      else length[at] = Math.max(length[at + width], length[at + 1]);
    }
  }
  const [inA, inB] = [new Uint8Array(a.length).fill(1), new Uint8Array(b.length).fill(1)];
  inA.fill(0, start, start + n);
  inB.fill(0, start, start + m);
  for (let i = 0, j = 0; i < n && j < m; ) {
    const at = i * width + j;
    if (a[start + i] === b[start + j]) inA[start + i++] = inB[start + j++] = 1;
    else if (length[at + width] >= length[at + 1]) i += 1;
    else j += 1;
  }
  return [inA, inB];
}

/** Neighbours of a kind in one piece; a space between two words that differ is marked with them. */
function runs(tokens, same) {
  const kept = tokens.map((text, i) => Boolean(same[i]) && !(same[i - 1] === 0 && same[i + 1] === 0 && /^\s+$/.test(text)));
  const found = [];
  tokens.forEach((text, i) => {
    const last = found.at(-1);
    if (last && last.same === kept[i]) last.text += text;
    else found.push({ text, same: kept[i] });
  });
  return found;
}
