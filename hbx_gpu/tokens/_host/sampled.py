"""Rows of the models that sample genes, in numba; see :mod:`hbx_gpu.tokens._reference_sampled`."""

from __future__ import annotations

import numpy as np

from hbx_gpu.tokens._draws import Step, special_index
from hbx_gpu.tokens._host.arithmetic import log1p
from hbx_gpu.tokens._host.bits import list_bits
from hbx_gpu.tokens._host.draws import HALF, jit, keys, mulhi, two_keys, unit_bits, words
from hbx_gpu.tokens._host.lanes import LANES, eight_up_to
from hbx_gpu.tokens._host.sorting import smallest

FIXED = 2.0**32
SMALL = 4096
"""Logarithms of counts below this come from a table."""
_PICK, _ZEROS = int(Step.PICK), int(Step.ZEROS)
_THIN, _RATIO, _TIES = int(Step.THIN), int(Step.RATIO), int(Step.TIES)
_PREFIX, _PROMPTS, _PROMPT_0 = int(special_index(0)), int(special_index(1)), int(special_index(2))
FEW, _WORD = 2048, 64
"""Genes whose keys are made at a time, and looked through at a time."""
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


# -- State ---------------------------------------------------------------------------------------------


@jit
def ranked_rows(
    pointers, genes, counts, cells, seed, epoch, logged, cls_column, n_expressed, n_absent, count_one_absent,
    shared, shared_columns, token, index_of, known, known_index, some_keys, some, logs_of, numbers,
    key, key_2, key_3, ties, histogram, item, index, level, is_known,
    ids, values, task_ids, task_values, totals,
):  # fmt: skip
    """All outputs, a row after the other; `level` and `is_known` are zeros by column, left so."""
    length = ids.shape[1]
    for row in range(len(cells)):
        a = pointers[row]
        n = pointers[row + 1] - a
        columns, amount = genes[a : a + n], counts[a : a + n]
        cell, out = np.uint64(cells[row]), ids[row]
        top, total = 0.0, 0.0
        for i in range(n):
            x = amount[i]
            top = max(top, x)
            if logged:
                log = np.float32(x)
            elif x < SMALL:
                log = logs_of[np.int32(x)]
            else:
                log = np.float32(log1p(x))
            level[columns[i]] = log
            is_known[columns[i]] = 1
            total += np.rint(np.float64(log) * FIXED)
            index[i] = index_of[columns[i]]
        total /= FIXED
        # The highest first; equal ones by their draws.
        keys(seed, epoch, cell, _TIES, 0, index, n, ties)
        if not logged and top < SMALL:
            for i in range(n):
                key[i] = (np.uint64(top - amount[i]) << np.uint64(52)) | (ties[i] >> np.uint64(12))
        else:
            for i in range(n):
                bits = np.uint64(np.float32(level[columns[i]]).view(np.uint32))
                key[i] = ((np.uint64(0xFFFFFFFF) - bits) << HALF) | (ties[i] >> HALF)
        smallest(key, n, n, key_2, key_3, histogram, item)
        for k in range(1, n):  # equal in the bits of the draw that had room
            one = item[k]
            j = k - 1
            while j >= 0 and key[item[j]] == key[one] and ties[item[j]] > ties[one]:
                item[j + 1] = item[j]
                j -= 1
            item[j + 1] = one
        out[0] = cls_column
        kept = min(n, length - 1)
        for k in range(kept):
            out[1 + k] = columns[item[k]]
        missing = length - 1 - kept
        n_zero = len(known) - n
        n_low = n_zero  # genes that count as unexpressed in the tasks
        if count_one_absent:
            for i in range(n):
                n_low += level[columns[i]] < np.float32(1.0)
        found, found_2 = _unexpressed(
            known, known_index, is_known, level, count_one_absent, missing, n_zero, n_absent, n_low,
            seed, epoch, cell, key_2, key_3, item, some_keys, some,
        )  # fmt: skip
        if missing:
            if n_zero >= missing:
                smallest(some_keys[0], found, missing, key_2, key_3, histogram, item)
                for k in range(missing):
                    out[1 + kept + k] = some[0, item[k]]
            else:
                keys(seed, epoch, cell, _ZEROS, 1, numbers, missing, key)
                for k in range(missing):
                    if n_zero:
                        out[1 + kept + k] = some[0, mulhi(key[k], np.uint64(n_zero))]
                    else:
                        out[1 + kept + k] = columns[mulhi(key[k], np.uint64(n))]
        for k in range(length):
            column = out[k]
            if total > 0.0:
                values[row, k] = np.float32(100.0 * (np.float64(level[column]) / total))
            else:
                values[row, k] = np.float32(100.0 / len(known))
            out[k] = token[column]

        # Genes to predict.
        for i in range(n):
            index[i] = index_of[columns[i]]
        keys(seed, epoch, cell, _PICK, 0, index, n, key)
        _tasks(
            columns, key, n, n, known, n_expressed, _PICK, 1, seed, epoch, cell, numbers,
            ties, key_2, key_3, histogram, item, task_ids[row],
        )  # fmt: skip
        _tasks(
            some[1], some_keys[1], found_2, n_low, known, n_absent, _ZEROS, 3, seed, epoch, cell, numbers,
            ties, key_2, key_3, histogram, item, task_ids[row, n_expressed:],
        )  # fmt: skip
        own = n_expressed + n_absent
        whole = 0.0
        for k in range(own):
            column = task_ids[row, k]
            task_ids[row, k] = token[column]
            task_values[row, k] = level[column]
        for k in range(len(shared)):
            task_ids[row, own + k] = shared[k]
            column = shared_columns[k]
            task_values[row, own + k] = level[column] if column >= 0 else np.float32(0)
        for k in range(task_values.shape[1]):
            whole += np.rint(np.float64(task_values[row, k]) * FIXED)
        totals[row] = np.float32(whole / FIXED)
        for i in range(n):
            level[columns[i]] = 0.0
            is_known[columns[i]] = 0


@jit
def _unexpressed(
    known, known_index, is_known, level, low_too, wanted, n, wanted_2, n_2,
    seed, epoch, cell, few, few_2, item, keys_of, columns_of,
):  # fmt: skip
    """Unexpressed genes whose keys may be among the smallest: to fill up with, and to predict.

    keys_of[0, :found], columns_of[0, :found]: those of `n` genes that hold the `wanted` smallest keys, in
    ascending column; all of them where there are fewer than `wanted`. The same in [1] by the second keys, of
    `n_2` genes, with those of a logarithm below 1 where `low_too`. Returns both numbers. `few` and `few_2`
    have at least FEW entries, `item` SPARE more.
    """
    limit, limit_2 = _limit(wanted, n), _limit(wanted_2, n_2)
    while True:
        found, found_2 = 0, 0
        for first in range(0, len(known), FEW):
            m = min(FEW, len(known) - first)
            two_keys(seed, epoch, cell, _ZEROS, known_index[first : first + m], m, few, few_2)
            # Stored in any case, and counted where it applies, so that no branch has to be guessed.
            for j in range(_up_to(few, m, limit, item)):
                column = known[first + item[j]]
                keys_of[0, found], columns_of[0, found] = few[item[j]], column
                found += is_known[column] == 0
            for j in range(_up_to(few_2, m, limit_2, item)):
                column = known[first + item[j]]
                keys_of[1, found_2], columns_of[1, found_2] = few_2[item[j]], column
                found_2 += (is_known[column] == 0) | (low_too & (level[column] < np.float32(1.0)))
        if found >= min(wanted, n) and found_2 >= min(wanted_2, n_2):
            return found, found_2
        limit, limit_2 = _ALL, _ALL


@jit
def _up_to(some_keys, n, limit, item):
    """item = places of those of n keys that are at most `limit`, ascending; returns how many."""
    found = np.uint64(0)
    for first in range(0, n, _WORD):
        bits = np.uint64(0)
        for k in range(0, _WORD, LANES):
            bits |= eight_up_to(some_keys, first + k, limit) << np.uint64(k)
        if n - first < _WORD:
            bits &= (np.uint64(1) << np.uint64(n - first)) - np.uint64(1)
        found = list_bits(bits, np.uint64(first), item, found)
    return np.int64(found)


@jit
def _limit(wanted, n):
    """Keys up to this hold the `wanted` smallest of n, nearly always."""
    share = (wanted + 6.0 * np.sqrt(wanted) + 16.0) / max(n, 1)
    return _ALL if wanted >= n or share >= 1.0 else np.uint64(share * 2.0**64)


@jit
def _tasks(
    some, some_keys, found, n_some, known, n, step, block, seed, epoch, cell, numbers,
    key, key_2, key_3, histogram, item, out,
):  # fmt: skip
    """out[:n] = n of `n_some` columns by their keys, which the `found` ones given here have the smallest of.

    With replacement where they are too few, of all known ones if there is none.
    """
    if n_some >= n:
        smallest(some_keys, found, n, key_2, key_3, histogram, item)
        for k in range(n):
            out[k] = some[item[k]]
        return
    keys(seed, epoch, cell, step, block, numbers, n, key)
    for k in range(n):
        if n_some:
            out[k] = some[mulhi(key[k], np.uint64(n_some))]
        else:
            out[k] = known[mulhi(key[k], np.uint64(len(known)))]


# -- CellariumGPT --------------------------------------------------------------------------------------


@jit
def prompt_rows(
    pointers, genes, counts, totals, cells, seed, epoch, masks, thinned, min_umis, max_umis, prefix,
    prefix_sums, fixed_shown, vocabulary, predict, query_of, token, index_of, front,
    known, known_index, level, logs, logs_of_depths, some_keys, some, picked,
    key, key_2, key_3, histogram, item, index,
    ids, values, query_mask, total_counts, prompt_mask, labels,
    metadata_ids, metadata_labels, metadata_mask, label_weights,
):  # fmt: skip
    """All outputs, a row after the other.

    `level`: zeros by column, left so; `logs`, `logs_of_depths`: logarithms of whole numbers from 0.
    """
    m = len(masks)
    n = ids.shape[1] - m
    for row in range(len(cells)):
        a = pointers[row]
        n_known = pointers[row + 1] - a
        columns, amount = genes[a : a + n_known], counts[a : a + n_known]
        cell, total = np.uint64(cells[row]), totals[row]
        depth = min(total, max_umis)
        log_of_depth = np.float32(log1p(np.rint(depth)))
        shows = prefix
        for i in range(n_known):
            level[columns[i]] = amount[i]
        if predict:
            for k in range(n):
                picked[k] = known[k]
        else:
            found = _drawn(known, known_index, n, seed, epoch, cell, key, item, some_keys, some)
            smallest(some_keys, found, n, key_2, key_3, histogram, item)
            for k in range(n):
                picked[k] = some[item[k]]
                index[k] = index_of[picked[k]]
            if thinned > 0.0:
                keys(seed, epoch, cell, _RATIO, 0, index, n, key)
            if len(prefix_sums):
                w0, w1, _, _ = words(seed, epoch, cell, _RATIO, _PREFIX, 0)
                one = (w0 << HALF) | w1
                shows = 0
                while shows < len(prefix_sums) and prefix_sums[shows] <= one:
                    shows += 1
                shows = min(shows, n - 1)
        for k in range(n):
            column = picked[k]
            x = level[column]
            wanted, log = depth, log_of_depth
            if predict:
                count = np.rint(x * (depth / total if total > 0.0 else 0.0))
                query = query_of[column]
            else:
                if thinned > 0.0:
                    part = min(np.float64(unit_bits(key[k])) * 2.0**-53 / thinned, 1.0)
                    wanted = min_umis + part * (depth - min_umis)
                    whole = np.rint(wanted)
                    if whole < len(logs_of_depths):
                        log = logs_of_depths[np.int64(whole)]
                    else:
                        log = np.float32(log1p(whole))
                count = x
                if x > 0.0:
                    share = min(max(wanted / max(total, 1.0), 0.0), 1.0)
                    if share < 1.0:
                        count = _thin(seed, epoch, cell, index[k], x, share)
                query = k >= shows
            ids[row, k] = token[column]
            values[row, k] = np.float32(0.0) if query or count == 0.0 else np.float32(_log(logs, count))
            query_mask[row, k] = np.float32(query)
            total_counts[row, k] = log
            prompt_mask[row, k] = not query
            labels[row, k] = np.int64(min(count, vocabulary - 1.0))
        for i in range(n_known):
            level[columns[i]] = 0.0
        weight, queries = label_weights[row], 0.0
        for k in range(n):
            queries += query_mask[row, k]
        equal = np.float32(1.0 / max(queries, 1.0) / len(cells))
        for k in range(n):
            weight[k] = query_mask[row, k] * equal
        weight[n:] = 0.0
        for k in range(n, n + m):
            ids[row, k], values[row, k], query_mask[row, k], total_counts[row, k] = 0, 0.0, 0.0, 0.0
            labels[row, k] = 0
        head = front[row if len(front) > 1 else 0]
        _metadata(
            head, masks, fixed_shown, seed, epoch, cell, key, item, prompt_mask[row, n:],
            metadata_ids[row], metadata_labels[row], metadata_mask[row],
        )  # fmt: skip


@jit
def _drawn(known, known_index, wanted, seed, epoch, cell, few, item, keys_of, columns_of):
    """Known genes whose keys may be among the `wanted` smallest, in ascending column; returns how many."""
    limit = _limit(wanted, len(known))
    while True:
        found = 0
        for first in range(0, len(known), FEW):
            m = min(FEW, len(known) - first)
            keys(seed, epoch, cell, _PICK, 0, known_index[first : first + m], m, few)
            for j in range(_up_to(few, m, limit, item)):
                keys_of[found], columns_of[found] = few[item[j]], known[first + item[j]]
                found += 1
        if found >= wanted or limit == _ALL:
            return found
        limit = _ALL


@jit
def _log(logs, count):
    return logs[np.int64(count)] if count < len(logs) else log1p(count)


@jit
def _thin(seed, epoch, cell, gene, count, share):
    """How many of `count` words lie below a share of 2**32."""
    below = np.uint64(np.floor(share * 2.0**32))
    kept, left, block = 0, count, 0
    while left > 0.0:
        w0, w1, w2, w3 = words(seed, epoch, cell, _THIN, gene, block)
        kept += w0 < below
        kept += (left > 1.0) & (w1 < below)
        kept += (left > 2.0) & (w2 < below)
        kept += (left > 3.0) & (w3 < below)
        left -= 4.0
        block += 1
    return np.float64(kept)


@jit
def _metadata(head, masks, fixed_shown, seed, epoch, cell, key, item, prompts, ids, labels, mask):
    """Which metadata is shown, and its codes with the others hidden."""
    m = len(masks)
    for k in range(m):
        mask[k] = False
    if len(fixed_shown) == m:
        for k in range(m):
            mask[k] = fixed_shown[k]
    else:
        w0, _, _, _ = words(seed, epoch, cell, _RATIO, _PROMPTS, 0)
        n = np.int64((w0 * np.uint64(m + 1)) >> HALF)
        for k in range(m):
            item[k] = _PROMPT_0 - k
        keys(seed, epoch, cell, _PICK, 0, item, m, key)
        for k in range(m):
            before = 0
            for j in range(m):
                before += key[j] < key[k]
            mask[k] = before < n
    for k in range(m):
        code = head[k]
        mask[k] &= code >= 0
        prompts[k] = mask[k]
        labels[k] = max(code, 0)
        ids[k] = code if mask[k] else (0 if code < 0 else masks[k])
