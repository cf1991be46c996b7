// Rows of a flat CSR to token sequences, a block for each row: known genes with exact totals, lengths and widths,
// then ids, values, labels and masks. Equals `sequence_row` of hbx_gpu/tokens/_reference.py bit for bit.
#include "tokens.cuh"

#define HBX_LARGEST 9007199254740992ull  // 2^53
#define HBX_SMALL 4096u                  // counts below this are binned by histogram

// --- known genes ------------------------------------------------------------------------------------------

// Writes known genes with counts above 0 in the order they are stored; returns how many. Sums are in every thread.
HBX_DEVICE u32 hbx_known(const HbxRecipe& recipe, const HbxRows& rows, u64 begin, u64 end, u32* genes, double* counts,
                         u64* sum, u64* known_sum, u32* bits, HbxTeam* team) {
    u64 all = 0, known = 0;
    u32 found = 0, bad = 0;
    for (u64 first = begin; first < end; first += blockDim.x) {
        u64 i = first + threadIdx.x;
        i32 column = i < end ? rows.indices[i] : -1, own = -1;
        double x = 0;
        if (column >= 0 && (u32)column < recipe.n_features) {
            x = hbx_load_number<double>(rows.values, rows.value_type, i);
            own = recipe.column[column];
            bool fine = x >= 0 && x - x == 0 && (recipe.logged || x == floor(x));  // neither NaN nor infinity
            if (!fine) bad |= HBX_NOT_COUNTS;
            u64 count = x >= 0 && x <= 9007199254740992.0 ? (u64)x : HBX_LARGEST + 1u;
            if (!recipe.logged) {
                all = hbx_min64(all + count, HBX_LARGEST + 1u);
                if (own >= 0) known = hbx_min64(known + count, HBX_LARGEST + 1u);
            }
        } else if (column != -1) {
            bad |= HBX_BAD_COLUMN;
        }
        bool keeps = own >= 0 && (u32)own < recipe.n_features && x > 0;
        u32 total, place = found + hbx_block_before((u32)keeps, team, &total);
        if (keeps) {
            genes[place] = (u32)own;
            counts[place] = x;
        }
        found += total;
    }
    *sum = hbx_block_sum(all, team);
    *known_sum = hbx_block_sum(known, team);
    *bits = bad | (*sum > HBX_LARGEST ? HBX_TOO_MANY : 0u);
    return found;
}

// Puts genes that do not ascend in order, and sums those that repeat; returns how many there are.
HBX_DEVICE u32 hbx_in_order(u32* genes, double* counts, u32 n, const HbxWork& work, HbxTeam* team) {
    int wrong = 0;
    for (u32 k = threadIdx.x + 1u; k < n; k += blockDim.x) wrong |= genes[k - 1u] >= genes[k];
    if (!__syncthreads_or(wrong)) return n;
    u64* key = work.keys(n);
    for (u32 k = threadIdx.x; k < n; k += blockDim.x) key[k] = genes[k];
    hbx_smallest(key, n, n, &work.space, work.item, team);
    u64* saved = work.space.a;
    for (u32 k = threadIdx.x; k < n; k += blockDim.x) saved[k] = hbx_bits64(counts[k]);
    u32 found = 0;  // counting the first genes is a barrier before anything saved is read
    for (u32 first = 0; first < n; first += blockDim.x) {
        u32 k = first + threadIdx.x, total;
        bool starts = k < n && (k == 0 || key[work.item[k]] != key[work.item[k - 1u]]);
        u32 place = found + hbx_block_before((u32)starts, team, &total);
        if (starts) {
            double sum = 0;
            for (u32 j = k; j < n && key[work.item[j]] == key[work.item[k]]; j++) {
                sum = HBX_ADD(sum, hbx_double(saved[work.item[j]]));
            }
            genes[place] = (u32)key[work.item[k]];
            counts[place] = sum;
        }
        found += total;
    }
    __syncthreads();
    return found;
}

// All known genes with their counts, in the place of those that are expressed.
HBX_DEVICE u32 hbx_with_zeros(const HbxRecipe& recipe, u32* genes, double* counts, u32 n, const HbxWork& work) {
    u64* saved = work.space.a;
    for (u32 k = threadIdx.x; k < n; k += blockDim.x) {
        work.list[k] = genes[k];
        saved[k] = hbx_bits64(counts[k]);
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < recipe.n_known; i += blockDim.x) {
        u32 gene = (u32)recipe.known[i], low = 0, high = n;
        while (low < high) {
            u32 middle = (low + high) / 2u;
            if (work.list[middle] < gene) low = middle + 1u;
            else high = middle;
        }
        genes[i] = gene;
        counts[i] = low < n && work.list[low] == gene ? hbx_double(saved[low]) : 0.0;
    }
    return recipe.n_known;
}

// Tokens of a row of :class:`Sequence` with n known genes; of other recipes their full length.
HBX_DEVICE i32 hbx_row_length(const HbxRecipe& recipe, u32 n, double known_total) {
    const i64* whole = recipe.whole;
    if (whole[HBX_I_KIND] != 0) return (i32)whole[HBX_I_LENGTH];
    i64 kept = (i64)n < whole[HBX_I_KEEP] ? (i64)n : whole[HBX_I_KEEP];
    i64 filled = whole[HBX_I_FILL_TO] > kept ? whole[HBX_I_FILL_TO] - kept : 0;
    if (filled > (i64)recipe.n_known - (i64)n) filled = (i64)recipe.n_known - (i64)n;
    i64 length = whole[HBX_I_N_FRONT] + kept + filled + whole[HBX_I_N_BACK];
    if (whole[HBX_I_DEPTH] != 0) length += whole[HBX_I_DEPTH_DROP] && known_total <= 1 ? 1 : 2;
    return (i32)length;
}

// Known genes of each row, ascending, with counts above 0 (0 too, where a recipe takes all genes), totals and lengths.
// Checked: offsets, columns, values, and that genes fit their places. A row that is refused has no genes.
HBX_KERNEL token_genes(const HbxRecipe* recipes, const HbxRows* batch, u32* status, u32* any) {
    HBX_DYN_SMEM(shared);
    __shared__ HbxTeam team;
    const HbxRecipe& recipe = *recipes;
    const HbxRows& rows = *batch;
    HbxWork work(rows, shared);
    for (u64 r = blockIdx.x; r < rows.n_rows; r += gridDim.x) {
        i64 begin = rows.offsets[r], end = rows.offsets[r + 1], at = rows.room[r], limit = rows.room[r + 1];
        bool fits = hbx_has_work(recipe, rows) && begin >= 0 && begin <= end && (u64)end <= rows.n_elements &&
                    at >= 0 && at <= limit && (u64)limit <= rows.n_places && end - begin <= limit - at && (u64)(limit - at) <= rows.longest &&
                    (!recipe.zeros || (i64)recipe.n_known <= limit - at);
        u64 sum = 0, known_sum = 0;
        u32 n = 0, bits = 0;
        if (fits) {
            u32* genes = rows.genes + at;
            double* counts = rows.counts + at;
            n = hbx_known(recipe, rows, (u64)begin, (u64)end, genes, counts, &sum, &known_sum, &bits, &team);
            n = hbx_in_order(genes, counts, n, work, &team);
            if (recipe.zeros) n = hbx_with_zeros(recipe, genes, counts, n, work);
        } else {
            bits = HBX_BAD_PLACE;
        }
        if (bits != 0) hbx_fail(status + r, any, bits);
        if (threadIdx.x == 0) {
            rows.n_genes[r] = n;
            rows.totals[r] = (double)sum;
            rows.known_totals[r] = (double)known_sum;
            rows.lengths[r] = hbx_row_length(recipe, n, (double)known_sum);
        }
    }
}

// Widths, and where each row begins. One block.
HBX_KERNEL token_starts(const HbxRecipe* recipes, const HbxRows* batch) {
    __shared__ HbxTeam team;
    const HbxRecipe& recipe = *recipes;
    const HbxRows& rows = *batch;
    u64 longest = 0, carry = 0;
    for (u64 first = 0; first < rows.n_rows; first += blockDim.x) {
        u64 r = first + threadIdx.x, total;
        u64 own = r < rows.n_rows ? (u64)rows.lengths[r] : 0;
        longest = hbx_max64(longest, own);
        u64 before = carry + hbx_block_before(own, &team, &total);
        if (r < rows.n_rows && rows.padding == 2u) {
            rows.starts[r] = (i64)before;
            rows.bounds[r] = (i32)before;
        }
        carry += total;
    }
    if (threadIdx.x == 0) team.wide[0] = 0;
    __syncthreads();
    atomicMax(&team.wide[0], longest);
    __syncthreads();
    longest = team.wide[0];
    i64 width = rows.padding == 1u ? recipe.whole[HBX_I_LENGTH] : (i64)longest, generated = 0;
    width = (width + rows.multiple - 1) / rows.multiple * rows.multiple;
    if (recipe.whole[HBX_I_KIND] == 0 && recipe.whole[HBX_I_MASK] == 4) {
        i64 most = width > recipe.whole[HBX_I_N_FRONT] ? width - recipe.whole[HBX_I_N_FRONT] : 0;
        generated = (i64)HBX_MUL((double)(width - 1), rows.gen_ratio);
        generated = generated < most ? generated : most;
        width -= generated;
    }
    for (u64 r = threadIdx.x; r < rows.n_rows && rows.padding != 2u; r += blockDim.x) rows.starts[r] = (i64)r * width;
    if (threadIdx.x == 0) {
        i64 all = rows.padding == 2u ? (i64)carry : (i64)rows.n_rows * width;
        rows.starts[rows.n_rows] = all;
        if (rows.padding == 2u) rows.bounds[rows.n_rows] = (i32)all;
        rows.widths[0] = width;
        rows.widths[1] = generated;
        rows.widths[2] = all;
        rows.widths[3] = (i64)longest;
    }
}

// --- bins -------------------------------------------------------------------------------------------------

// Values of a row that are binned: of all its genes, or of those that are kept.
struct HbxBinned {
    const double* amount;
    const u32* item;  // null: all
    u32 n;
    HBX_DEVICE double operator()(u32 k) const { return amount[item ? item[k] : k]; }
};

// Between which of n sorted values a quantile lies, and how far along.
struct HbxBetween {
    double t;
    u32 first, second;
    HBX_DEVICE HbxBetween(double quantile, u32 n, bool torch) {
        if (torch) {
            float x = __fmul_rn(hbx_f32(quantile), (float)(n - 1u)), floored = floorf(x);
            t = __fsub_rn(x, floored);
            first = (u32)floored;
            second = (u32)ceilf(x);
        } else {
            double x = HBX_MUL(quantile, (double)(n - 1u)), floored = floor(x);
            t = HBX_SUB(x, floored);
            first = (u32)floored;
            second = first + 1u < n ? first + 1u : n - 1u;
        }
    }
    HBX_DEVICE double edge(float a, float b, bool torch) const {
        float d = __fsub_rn(b, a);
        if (torch) {
            float w = hbx_f32(t);
            if (w < 0.5f) return __fadd_rn(a, __fmul_rn(w, d));
            return __fsub_rn(b, __fmul_rn(d, __fsub_rn(1.0f, w)));
        }
        if (t < 0.5) return HBX_ADD(a, HBX_MUL(d, t));
        return HBX_SUB(b, HBX_MUL(d, HBX_SUB(1.0, t)));
    }
};

// edges = quantiles of the values above 0; false where there are none. `histogram`: room for HBX_SMALL words.
HBX_DEVICE bool hbx_edges(const HbxRecipe& recipe, const HbxBinned& values, double* edges, u32* histogram,
                          const HbxWork& work, HbxTeam* team) {
    bool torch = recipe.whole[HBX_I_TORCH_EDGES] != 0;
    u32 own = 0, expressed;
    int large = 0;
    for (u32 i = threadIdx.x; i < values.n; i += blockDim.x) {
        own += values(i) > 0;
        large |= values(i) >= HBX_SMALL;
    }
    hbx_block_before(own, team, &expressed);
    if (expressed == 0) return false;
    if (__syncthreads_or(large)) {
        u64* key = work.keys(values.n);
        for (u32 i = threadIdx.x; i < values.n; i += blockDim.x) {
            key[i] = values(i) > 0 ? (u64)hbx_bits(hbx_f32(values(i))) : 0xffffffffull;
        }
        hbx_smallest(key, values.n, expressed, &work.space, work.list, team);
        for (u32 j = threadIdx.x; j < recipe.n_quantiles; j += blockDim.x) {
            HbxBetween between(recipe.quantiles[j], expressed, torch);
            float a = hbx_f32(values(work.list[between.first])), b = hbx_f32(values(work.list[between.second]));
            edges[j] = between.edge(a, b, torch);
        }
        __syncthreads();
        return true;
    }
    for (u32 v = threadIdx.x; v < HBX_SMALL; v += blockDim.x) histogram[v] = 0;
    __syncthreads();
    for (u32 i = threadIdx.x; i < values.n; i += blockDim.x) {
        if (values(i) > 0) atomicAdd(histogram + (u32)values(i), 1u);
    }
    __syncthreads();
    u32 carry = 0;  // histogram becomes the number of values up to each
    for (u32 first = 0; first < HBX_SMALL; first += blockDim.x) {
        u32 v = first + threadIdx.x, total, count = v < HBX_SMALL ? histogram[v] : 0;
        u32 before = carry + hbx_block_before(count, team, &total);
        if (v < HBX_SMALL) histogram[v] = before + count;
        carry += total;
    }
    __syncthreads();
    for (u32 j = threadIdx.x; j < recipe.n_quantiles; j += blockDim.x) {
        HbxBetween between(recipe.quantiles[j], expressed, torch);
        u32 value[2];
        for (u32 which = 0; which < 2u; which++) {
            u32 rank = which ? between.second : between.first, low = 0, high = HBX_SMALL - 1u;
            while (low < high) {  // the first value with more than `rank` up to it
                u32 middle = (low + high) / 2u;
                if (histogram[middle] <= rank) low = middle + 1u;
                else high = middle;
            }
            value[which] = low;
        }
        edges[j] = between.edge((float)value[0], (float)value[1], torch);
    }
    __syncthreads();
    return true;
}

// How many of n ascending edges lie below x, or not above it.
HBX_DEVICE u32 hbx_edges_below(const double* edges, u32 n, double x, bool equal) {
    u32 low = 0, high = n;
    while (low < high) {
        u32 middle = (low + high) / 2u;
        if (edges[middle] < x || (equal && edges[middle] == x)) low = middle + 1u;
        else high = middle;
    }
    return low;
}

HBX_DEVICE float hbx_bin_of(const HbxRecipe& recipe, const double* edges, double count, u32 index,
                            const HbxDraws& draws) {
    if (!(count > 0)) return 0;
    double x = (double)hbx_f32(count);
    i64 side = recipe.whole[HBX_I_SIDE];
    if (side == 2) return (float)(hbx_edges_below(edges, recipe.n_quantiles, x, false) + 1u);
    u32 above = hbx_edges_below(edges, recipe.n_quantiles, x, true);
    if (side == 1) return (float)above;
    u32 below = hbx_edges_below(edges, recipe.n_quantiles, x, false);
    return (float)(above - hbx_scaled(draws.words(HBX_BIN, index).w[0], above - below));
}

// --- one row ----------------------------------------------------------------------------------------------

// Genes of a row that have been chosen: `item` names `kept` of its own, `chosen` the columns of all `n`.
struct HbxChosen {
    u32 kept, n;
};

HBX_DEVICE void hbx_order(const HbxRecipe& recipe, const HbxRow& row, u32 kept, const HbxWork& work, HbxTeam* team) {
    const i64* whole = recipe.whole;
    i64 order = row.n > kept && whole[HBX_I_CUT_RANDOM] ? 3 : whole[HBX_I_ORDER];
    if (whole[HBX_I_MASK] == 4) order = 3;
    if (order == 0) {
        for (u32 k = threadIdx.x; k < kept; k += blockDim.x) work.item[k] = k;
        return;
    }
    u64* key = work.keys(row.n);
    u32 norm = (u32)whole[HBX_I_RANK];
    for (u32 i = threadIdx.x; i < row.n; i += blockDim.x) {
        u32 column = row.columns[i];
        if (order == 1) {
            key[i] = (u64)recipe.token[column];
        } else if (order == 3) {
            key[i] = row.draws.key(HBX_PICK, (u32)recipe.index[column]);
        } else {
            double value = hbx_normalize(norm, row.amount[i], row.totals, recipe.fraction[HBX_F_RANK_TARGET]);
            if (whole[HBX_I_SCALED]) value = hbx_rank_value(norm, value, recipe.scale[column]);
            key[i] = ~hbx_bits64(value);
        }
    }
    hbx_smallest(key, row.n, kept, &work.space, work.item, team);
}

HBX_DEVICE HbxChosen hbx_choose(const HbxRecipe& recipe, const HbxRow& row, const HbxWork& work, HbxTeam* team) {
    const i64* whole = recipe.whole;
    HbxChosen genes = {row.n, 0};
    if (whole[HBX_I_MASK] != 4 && (i64)row.n > whole[HBX_I_KEEP]) genes.kept = (u32)whole[HBX_I_KEEP];
    hbx_order(recipe, row, genes.kept, work, team);
    for (u32 k = threadIdx.x; k < genes.kept; k += blockDim.x) work.chosen[k] = row.columns[work.item[k]];
    genes.n = genes.kept;
    if (whole[HBX_I_FILL] != 0 && whole[HBX_I_FILL_TO] > (i64)genes.kept) {
        u32 absent = hbx_absent(recipe, row, work.extra, work.list, team);
        u32 wanted = (u32)(whole[HBX_I_FILL_TO] - genes.kept);
        if (wanted > absent) wanted = absent;
        u32* filled = work.chosen + genes.kept;
        if (whole[HBX_I_FILL] == 1) {
            u64* key = work.keys(absent);
            for (u32 i = threadIdx.x; i < absent; i += blockDim.x) {
                key[i] = row.draws.key(HBX_ZEROS, (u32)recipe.index[work.list[i]]);
            }
            hbx_smallest(key, absent, wanted, &work.space, work.extra, team);
            for (u32 k = threadIdx.x; k < wanted; k += blockDim.x) filled[k] = work.list[work.extra[k]];
        } else {
            for (u32 k = threadIdx.x; k < wanted; k += blockDim.x) filled[k] = work.list[k];
        }
        genes.n += wanted;
    }
    __syncthreads();
    return genes;
}

// scFoundation's two values at the end of a row.
HBX_DEVICE float hbx_depth(const HbxRecipe& recipe, double known_total, u32 which) {
    double known = known_total > 1 ? known_total : 1, number = recipe.fraction[HBX_F_DEPTH_NUMBER];
    double measured = HBX_MUL(hbx_exact_log1p(HBX_SUB(known, 1.0)), 0.4342944819032518);
    if (which != 0) return hbx_f32(measured);
    i64 kind = recipe.whole[HBX_I_DEPTH];
    if (kind == 1) return hbx_f32(number);
    if (kind == 2) return hbx_f32(HBX_ADD(measured, number));
    return hbx_f32(HBX_MUL(hbx_exact_log1p(HBX_SUB(HBX_MUL(known, number), 1.0)), 0.4342944819032518));
}

// Values of one row's genes, by number.
struct HbxValues {
    const HbxRecipe& recipe;
    const HbxRow& row;
    const HbxWork& work;
    const double* edges;
    bool binned, any;  // by edges, if there are any

    HBX_DEVICE float of(u32 k, u32 kept) const {
        if (k >= kept) return 0;
        double count = row.amount[work.item[k]];
        if (binned) {
            if (!any) return 0;
            return hbx_bin_of(recipe, edges, count, (u32)recipe.index[work.chosen[k]], row.draws);
        }
        const i64* whole = recipe.whole;
        double value = hbx_normalize((u32)whole[HBX_I_NORM], count, row.totals, recipe.fraction[HBX_F_TARGET]);
        return hbx_bend((u32)whole[HBX_I_CURVE], value, hbx_f32(recipe.fraction[HBX_F_CLIP]));
    }
};

// The number that position k of a row has in draws: that of its gene, or of a special token.
HBX_DEVICE u32 hbx_index_at(const HbxRecipe& recipe, const HbxWork& work, u32 k, u32 n_front, u32 n_genes) {
    if (k < n_front) return HBX_MAX_INDEX - 1u - k;
    if (k < n_front + n_genes) return (u32)recipe.index[work.chosen[k - n_front]];
    return HBX_MAX_INDEX - 1u - (k - n_genes);
}

// An id that may be hidden, and its label.
HBX_DEVICE i64 hbx_hide(const HbxRecipe& recipe, const HbxDraws& draws, u32 index, i64 id, i64* label) {
    const i64* whole = recipe.whole;
    *label = -100;
    if (hbx_unit_bits(draws.key(HBX_MASK, index)) >= hbx_below(recipe.ratios[0])) return id;
    for (u32 p = 0; p < recipe.n_protect; p++) {
        if (recipe.protect[p] == id) return id;
    }
    *label = id;
    HbxWords4 words = draws.words(HBX_KIND, index);
    i64 kind = (i64)hbx_unit_bits(words.key());
    if (kind < whole[HBX_I_MASKED_BELOW]) return whole[HBX_I_MASK_ID];
    if (kind >= whole[HBX_I_REPLACED_BELOW]) return id;
    return whole[HBX_I_REPLACE_FIRST] + (i64)hbx_scaled(words.w[2], (u64)whole[HBX_I_REPLACE_SPAN]);
}

// Ids, values, counts and labels of a row at its places [out, out + width).
HBX_DEVICE void hbx_write_row(const HbxRecipe& recipe, const HbxRows& rows, const HbxRow& row, u64 r,
                              const HbxChosen& genes, const HbxValues& values, const HbxWork& work, u64 out,
                              u32 width) {
    const i64* whole = recipe.whole;
    const i64* head = rows.front + r * rows.front_step;
    u32 n_front = (u32)whole[HBX_I_N_FRONT], end = n_front + genes.n, n_back = (u32)whole[HBX_I_N_BACK];
    u32 length = (u32)rows.lengths[r];
    float pad = hbx_f32(recipe.fraction[HBX_F_PAD_VALUE]);
    for (u32 k = threadIdx.x; k < width; k += blockDim.x) {
        i64 id = whole[HBX_I_PAD_ID], label = -100;
        float value = pad, count = pad;
        if (k < n_front) {
            id = head[k];
            value = recipe.front_values[k];
        } else if (k < end) {
            id = recipe.token[work.chosen[k - n_front]];
            if (whole[HBX_I_VALUE]) value = values.of(k - n_front, genes.kept);
            count = k - n_front < genes.kept ? hbx_f32(row.amount[work.item[k - n_front]]) : 0.0f;
        } else if (k < end + n_back) {
            id = recipe.back[k - end];
            value = recipe.back_values[k - end];
        } else if (k < length) {
            u32 which = k - end - n_back;
            id = whole[HBX_I_DEPTH_FIRST + which];
            value = hbx_depth(recipe, row.totals.known, which);
        }
        if (whole[HBX_I_MASK] == 1) {
            if (k < length) {
                id = hbx_hide(recipe, row.draws, hbx_index_at(recipe, work, k, n_front, genes.n), id, &label);
            }
            hbx_put_id(rows.labels, recipe.ids_bytes, out + k, label);
        }
        hbx_put_id(rows.ids, recipe.ids_bytes, out + k, id);
        if (rows.attention) rows.attention[out + k] = k < length;
        if (whole[HBX_I_VALUE]) rows.values_out[out + k] = value;
        if (whole[HBX_I_COUNTS]) rows.counts_out[out + k] = count;
    }
}

// mask and masked_values of a row, whose values have been written.
HBX_DEVICE void hbx_mask_row(const HbxRecipe& recipe, const HbxRows& rows, const HbxRow& row, u32 n_genes,
                             const HbxWork& work, u64 out, u32 width, HbxTeam* team) {
    const i64* whole = recipe.whole;
    u32 n_front = (u32)whole[HBX_I_N_FRONT], first = whole[HBX_I_MASK_FRONT] ? 0 : n_front, last = n_front + n_genes;
    if (whole[HBX_I_MASK_SHORT]) last = last - n_front > first ? last - n_front : first;
    double ratio = recipe.ratios[0];
    if (recipe.n_ratios > 1u) ratio = recipe.ratios[hbx_scaled(row.draws.words(HBX_RATIO, 0).w[0], recipe.n_ratios)];
    bool exact = whole[HBX_I_MASK] == 3;
    u64 below = hbx_below(ratio);
    u32 n = last - first;
    u64* key = work.keys(n);
    for (u32 k = threadIdx.x; k < width; k += blockDim.x) {
        bool inside = k >= first && k < last;
        u64 drawn = inside ? row.draws.key(HBX_MASK, hbx_index_at(recipe, work, k, n_front, n_genes)) : 0;
        if (exact && inside) key[k - first] = drawn;
        rows.mask[out + k] = !exact && inside && hbx_unit_bits(drawn) < below;
    }
    if (exact) {
        u32 hidden = (u32)HBX_MUL((double)n, ratio);
        hbx_smallest(key, n, hidden, &work.space, work.list, team);
        for (u32 k = threadIdx.x; k < hidden; k += blockDim.x) rows.mask[out + first + work.list[k]] = 1;
        __syncthreads();
    }
    float hidden_value = hbx_f32(recipe.fraction[HBX_F_MASK_VALUE]);
    for (u32 k = threadIdx.x; k < width; k += blockDim.x) {
        rows.masked_values[out + k] = rows.mask[out + k] ? hidden_value : rows.values_out[out + k];
    }
}

// The two parts of a row that is cut: genes to generate come first in the order that was drawn.
HBX_DEVICE void hbx_write_split(const HbxRecipe& recipe, const HbxRows& rows, u64 r, const HbxChosen& genes,
                                const HbxValues& values, const HbxWork& work, u64 out, u32 width) {
    const i64* whole = recipe.whole;
    const i64* head = rows.front + r * rows.front_step;
    u32 n_front = (u32)whole[HBX_I_N_FRONT], room = (u32)rows.widths[1];
    u32 generated = (u32)HBX_MUL((double)genes.n, rows.gen_ratio);
    u32 made = generated < room ? generated : room;
    u32 seen = genes.n - generated, space = width > n_front ? width - n_front : 0;
    if (seen > space) seen = space;
    float pad = hbx_f32(recipe.fraction[HBX_F_PAD_VALUE]);
    for (u32 k = threadIdx.x; k < room; k += blockDim.x) {
        u64 at = r * room + k;
        bool there = k < made && at < rows.gen_capacity;
        if (at >= rows.gen_capacity) continue;
        hbx_put_id(rows.gen_ids, recipe.ids_bytes, at, there ? (i64)recipe.token[work.chosen[k]] : whole[HBX_I_PAD_ID]);
        rows.gen_values[at] = there ? values.of(k, genes.kept) : pad;
    }
    for (u32 k = threadIdx.x; k < width; k += blockDim.x) {
        bool gene = k >= n_front && k < n_front + seen;
        u32 g = generated + k - n_front;
        i64 id = k < n_front ? head[k] : gene ? (i64)recipe.token[work.chosen[g]] : whole[HBX_I_PAD_ID];
        hbx_put_id(rows.ids, recipe.ids_bytes, out + k, id);
        if (rows.attention) rows.attention[out + k] = k < n_front + seen;
        rows.values_out[out + k] = k < n_front ? recipe.front_values[k] : gene ? values.of(g, genes.kept) : pad;
    }
    if (threadIdx.x == 0) {
        rows.lengths[r] = (i32)(n_front + seen);
        rows.gen_lengths[r] = (i32)made;
    }
}

// All outputs of :class:`Sequence`. A block takes one row at a time, grid-stride; blocks of a multiple of 32 threads,
// HBX_SORT_THREADS at most. Dynamic shared memory: 24 bytes for each of n_shared keys, but HBX_SMALL words at least,
// then 8 bytes for each quantile. Checked: that rows fit the outputs.
HBX_KERNEL __launch_bounds__(256, 2) token_sequences(const HbxRecipe* recipes, const HbxRows* batch, u32* status,
                                                   u32* any) {
    HBX_DYN_SMEM(shared);
    __shared__ HbxTeam team;
    const HbxRecipe& recipe = *recipes;
    const HbxRows& rows = *batch;
    HbxWork work(rows, shared);
    u64 keys_bytes = 24ull * rows.n_shared;
    double* edges = (double*)(shared + (keys_bytes > 4ull * HBX_SMALL ? keys_bytes : 4ull * HBX_SMALL));
    u32* histogram = (u32*)shared;
    i64 kind = recipe.whole[HBX_I_VALUE], mask = recipe.whole[HBX_I_MASK];
    for (u64 r = blockIdx.x; r < rows.n_rows; r += gridDim.x) {
        i64 out = rows.starts[r], width = rows.padding == 2u ? rows.starts[r + 1] - out : rows.widths[0];
        bool fits = out >= 0 && width >= 0 && hbx_fits((u64)out, (u64)width, rows.capacity);
        if (!fits || !hbx_has_work(recipe, rows)) {
            if (threadIdx.x == 0) hbx_fail(status + r, any, HBX_BAD_PLACE);
            continue;
        }
        HbxRow row = hbx_row(rows, r);
        HbxChosen genes = hbx_choose(recipe, row, work, &team);
        HbxValues values = {recipe, row, work, edges, kind >= 2, false};
        if (kind >= 2) {
            HbxBinned binned = {row.amount, kind == 3 ? work.item : 0, kind == 3 ? genes.kept : row.n};
            values.any = hbx_edges(recipe, binned, edges, histogram, work, &team);
        } else if (kind == 1 && recipe.whole[HBX_I_NORM] == HBX_NORM_F32_KEPT) {
            u64 own = 0;
            for (u32 k = threadIdx.x; k < genes.kept; k += blockDim.x) own += (u64)row.amount[work.item[k]];
            row.totals.kept = (double)hbx_block_sum(own, &team);
        }
        if (mask == 4) {
            hbx_write_split(recipe, rows, r, genes, values, work, (u64)out, (u32)width);
        } else {
            hbx_write_row(recipe, rows, row, r, genes, values, work, (u64)out, (u32)width);
        }
        if (mask == 2 || mask == 3) {
            hbx_mask_row(recipe, rows, row, genes.n, work, (u64)out, (u32)width, &team);
        }
        __syncthreads();  // spare: on every path today, choosing the next row's genes begins with another
    }
}
