"""What n-grams reach on the same files: the figures a language model has to beat to have learned anything.

    python examples/ngram_baseline.py examples/tiny-python-lm

Interpolated modified Kneser-Ney (Chen and Goodman 1999, section 3) over bytes and over the model's own tokens, and the
same with an n-gram model of the document read so far mixed in, so that the baseline too may copy from its document.
The order, the size of the discounts and the strength of the document's own model are chosen on the held-out text
itself, in the baseline's favour.
"""

import dataclasses
import itertools
import json
import lzma
import math
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from python_corpus import Document, read_corpus, to_json
from tokenizers import Tokenizer


def padded(sequences: Iterable[Sequence[int]], order: int, start: int) -> tuple[np.ndarray, np.ndarray]:
    """All sequences on one axis, each after `order` start symbols, and where the true symbols are."""
    pieces, real = [], []
    for sequence in sequences:
        pieces += [np.full(order, start, np.int64), np.asarray(sequence, np.int64)]
        real += [np.zeros(order, bool), np.ones(len(sequence), bool)]
    return np.concatenate(pieces), np.concatenate(real)


def shifted(x: np.ndarray, by: int) -> np.ndarray:
    """`x[i - by]`, and -1 before the beginning."""
    return np.concatenate([np.full(by, -1, x.dtype), x[: len(x) - by]]) if by else x


@dataclasses.dataclass(frozen=True)
class _Order:
    """The n-grams of one length: sorted keys to look them up by, counts, and the totals of their contexts.

    Attributes:
        keys: `first symbol * types of the shorter n-grams + shorter n-gram`, sorted; the place is the n-gram's number.
        counts: how often each occurs, or in how many left contexts where a longer order exists.
        totals: by context number, the sum of the counts of its n-grams.
        kinds: by context number, how many of its n-grams have count 1, 2, and 3 or more.
        discounts: what is taken off counts 1, 2, and 3 or more.
    """

    keys: np.ndarray
    counts: np.ndarray
    totals: np.ndarray
    kinds: np.ndarray
    discounts: np.ndarray


class KneserNey:
    """Interpolated modified Kneser-Ney of one highest order."""

    def __init__(self, sequences: Sequence[Sequence[int]], symbols: int, order: int) -> None:
        self.symbols, self.order, self.start = symbols, order, symbols
        text, real = padded(sequences, order, self.start)
        numbers = text  # by position, the number of the n-gram that ends there
        sizes, keys = [symbols + 1], [np.arange(symbols + 1)]
        per_order = [text]
        for n in range(2, order + 1):
            pair = shifted(text, n - 1) * sizes[-1] + numbers
            pair[: n - 1] = self.start * sizes[-1] + numbers[: n - 1]
            unique, numbers = np.unique(pair, return_inverse=True)
            keys.append(unique)
            sizes.append(len(unique))
            per_order.append(numbers)
        self.orders: list[_Order] = []
        for n in range(1, order + 1):
            ids = per_order[n - 1]
            context = shifted(per_order[n - 2], 1) if n > 1 else np.zeros(len(ids), np.int64)
            contexts = sizes[n - 2] if n > 1 else 1
            if n == order:
                counts = np.bincount(ids[real], minlength=sizes[n - 1])
            else:
                longer = per_order[n]
                first = np.zeros(sizes[n], np.int64)
                first[longer[real]] = 1  # types of n + 1 symbols that end in a true symbol
                owner = np.zeros(sizes[n], np.int64)
                owner[longer] = ids
                counts = np.bincount(owner[first > 0], minlength=sizes[n - 1])
            context_of = np.zeros(sizes[n - 1], np.int64)
            context_of[ids[real]] = context[real]
            present = counts > 0
            totals = np.bincount(context_of[present], counts[present], minlength=contexts)
            kinds = np.stack(
                [
                    np.bincount(context_of[present & chosen], minlength=contexts)
                    for chosen in (counts == 1, counts == 2, counts >= 3)
                ]
            )
            n1, n2, n3, n4 = (max(1, int((counts == c).sum())) for c in (1, 2, 3, 4))
            y = n1 / (n1 + 2 * n2)
            discounts = np.clip([1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3], 0.05, [1, 2, 3])
            self.orders.append(_Order(keys[n - 1], counts, totals, kinds, np.asarray(discounts)))

    def probabilities(self, sequences: Sequence[Sequence[int]], scale: float = 1.0) -> list[np.ndarray]:
        """The probability of every symbol after those before it, for each lower highest order too.

        Args:
            scale: multiplies the discounts.

        Returns:
            One array per order from 1 up, over the symbols of all sequences end to end. Only the last is a
            Kneser-Ney model proper; the others show what each order adds.
        """
        text, real = padded(sequences, self.order, self.start)
        places = np.flatnonzero(real)
        p = np.full(len(places), 1 / self.symbols)
        numbers, out = text, []
        context = np.zeros(len(text), np.int64)
        for n, table in enumerate(self.orders, start=1):
            if n > 1:
                size = len(self.orders[n - 2].keys)
                context = shifted(numbers, 1)
                key = np.where(numbers >= 0, shifted(text, n - 1) * size + numbers, -1)
                key[: n - 1] = -1
                index = np.minimum(np.searchsorted(table.keys, key), len(table.keys) - 1)
                numbers = np.where(table.keys[index] == key, index, -1)
            h, w = context[places], numbers[places]
            known = h >= 0
            total = np.where(known, table.totals[np.maximum(h, 0)], 0)
            discounts = np.minimum(scale * table.discounts, [1, 2, 3])
            count = np.where(w >= 0, table.counts[np.maximum(w, 0)], 0)
            kept = np.maximum(count - np.concatenate([[0.0], discounts])[np.minimum(count, 3)], 0)
            freed = discounts @ table.kinds[:, np.maximum(h, 0)]
            with np.errstate(divide="ignore", invalid="ignore"):
                p = np.where(total > 0, (kept + freed * p) / total, p)
            out.append(p)
        return out


def with_document(
    sequences: Sequence[Sequence[int]], base: np.ndarray, orders: range, discount: float, weight: float
) -> np.ndarray:
    """`base` refined by n-grams of the document so far, shorter to longer, each by absolute discounting.

    Args:
        base: probability of every symbol under a model that does not learn from the document.
        orders: lengths of the document's n-grams. Short ones say less than `base` does already.
        discount: taken off every count.
        weight: pseudo-count with which the shorter model enters besides what the discounts free.
    """
    out = np.empty_like(base)
    place = 0
    for sequence in sequences:
        symbols = list(map(int, sequence))
        counts: dict[int, dict] = {n: defaultdict(dict) for n in orders}
        totals: dict[int, dict] = {n: defaultdict(int) for n in orders}
        for i, symbol in enumerate(symbols):
            p = base[place]
            for n in orders:
                if n > i + 1:
                    break
                context = tuple(symbols[i - n + 1 : i])
                total = totals[n].get(context, 0)
                if total:
                    seen = counts[n][context]
                    here = max(seen.get(symbol, 0) - discount, 0.0)
                    free = discount * len(seen) + weight
                    p = (here + free * p) / (total + weight)
                seen = counts[n][context]
                seen[symbol] = seen.get(symbol, 0) + 1
                totals[n][context] = total + 1
            out[place] = p
            place += 1
    return out


def bits(p: np.ndarray) -> float:
    """Code length of symbols that had these probabilities."""
    return float(-np.log2(p).sum())


def measure(
    training: Sequence[Document],
    held_out: Sequence[Document],
    tokenizer: Tokenizer,
    orders: Mapping[str, Sequence[int]],
) -> dict[str, float]:
    """Held-out bits per byte of every baseline, by its name.

    Args:
        orders: the orders to try over `"bytes"` and over `"tokens"`.
    """
    size = sum(len(d.text.encode()) for d in held_out)
    results = {
        "zlib -9": 8 * sum(len(zlib.compress(d.text.encode(), 9)) for d in held_out) / size,
        "xz -9e": 8 * sum(len(lzma.compress(d.text.encode(), preset=9 | lzma.PRESET_EXTREME)) for d in held_out) / size,
    }

    def sequences(documents: Sequence[Document], level: str) -> list[list[int]]:
        if level == "bytes":
            return [list(d.text.encode()) for d in documents]
        return [tokenizer.encode(d.text, add_special_tokens=False).ids for d in documents]

    for level, choices in orders.items():
        symbols = 256 if level == "bytes" else tokenizer.get_vocab_size()
        seen, unseen = sequences(training, level), sequences(held_out, level)
        best, chosen = math.inf, ""
        base = np.empty(0)
        for order in choices:
            model = KneserNey(seen, symbols, order)
            for scale in (0.8, 1.0, 1.2):
                p = model.probabilities(unseen, scale)[-1]
                if bits(p) < best:
                    best, base = bits(p), p
                    chosen = f"order {order}, discounts x{scale}"
        results[f"Kneser-Ney over {level} ({chosen})"] = best / size
        best, chosen = math.inf, ""
        shortest, longest = ((2, 3), (6, 9)) if level == "tokens" else ((4, 6), (9, 14))
        settings = itertools.product(shortest, longest, (0.7, 0.8), (1.0, 2.0))
        for low, high, discount, weight in settings:
            value = bits(with_document(unseen, base, range(low, high + 1), discount, weight))
            if value < best:
                best, chosen = value, f"orders {low} to {high}, discount {discount}, weight {weight}"
        results[f"the same and n-grams of the document so far, over {level} ({chosen})"] = best / size
    return results


def main(folder: str) -> None:
    """Prints the table and adds it to `training.json` in `folder`, whose tokenizer is used."""
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    results = measure(*read_corpus(), tokenizer, {"bytes": (7, 8, 9, 10), "tokens": (4, 5, 6, 7)})
    for name, value in results.items():
        print(f"{value:.4f}  {name}")
    path = Path(folder) / "training.json"
    record = json.loads(path.read_text()) | {"baselines": {name: round(value, 4) for name, value in results.items()}}
    path.write_text(to_json(record))


if __name__ == "__main__":
    main(sys.argv[1])
