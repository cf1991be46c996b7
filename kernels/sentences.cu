// Rows of the models that sample genes, a block for each row: UCE, State's embedding, CellariumGPT. Equals
// `weighted_row`, `ranked_row` and `prompt_row` of hbx_gpu/tokens/_reference_sampled.py bit for bit.
#include "tokens.cuh"

#define HBX_FIXED 4294967296.0  // sums of logarithms are made of whole multiples of 1 / this

// Places in `whole` and `fraction` for these recipes; those of sequences that they share keep theirs.
enum { HBX_W_SAMPLES = 0, HBX_W_CLS, HBX_W_CLOSE, HBX_W_OFFSET };
enum { HBX_R_CLS_COLUMN = 0, HBX_R_EXPRESSED, HBX_R_ABSENT, HBX_R_SHARED, HBX_R_ONE_ABSENT };
enum { HBX_P_PREFIX = 0, HBX_P_VOCABULARY, HBX_P_PREDICT };
enum { HBX_PF_THINNED = 0, HBX_PF_MIN, HBX_PF_MAX };

// Entry i of a table by its leading words, where `count` are wanted: a number of 0 .. n - 1.
HBX_DEVICE u32 hbx_below_span(u64 key, u32 n) { return (u32)__umul64hi(key, n); }

// --- UCE --------------------------------------------------------------------------------------------------

// Draws genes in proportion to log1p of their counts: times[i] = how often gene i of the row. The caller puts a
// barrier before it reads them.
HBX_DEVICE void hbx_draw_weighted(const HbxRow& row, u32 samples, u64* sums, u32* times, HbxTeam* team) {
    u64 carry = 0;
    for (u32 first = 0; first < row.n; first += blockDim.x) {
        u32 i = first + threadIdx.x;
        u64 own = 0, total;
        if (i < row.n) own = (u64)rint(HBX_MUL(hbx_exact_log1p(row.amount[i]), HBX_FIXED));
        u64 before = carry + hbx_block_before(own, team, &total);
        if (i < row.n) {
            sums[i] = before + own;
            times[i] = 0;
        }
        carry += total;
    }
    __syncthreads();
    for (u32 j = threadIdx.x; j < samples; j += blockDim.x) {
        u64 drawn = __umul64hi(row.draws.key(HBX_WEIGHTED, j), carry);
        u32 low = 0, high = row.n - 1u;
        while (low < high) {  // the first sum above the draw
            u32 middle = (low + high) / 2u;
            if (sums[middle] <= drawn) low = middle + 1u;
            else high = middle;
        }
        atomicAdd(times + low, 1u);
    }
}

// turn[c] = when chromosome c comes, of those that were drawn; returns how many those are. `turn` and `order` have
// n_codes entries. The caller puts a barrier before it reads them.
HBX_DEVICE u32 hbx_turns(const HbxRecipe& recipe, const HbxRow& row, const u32* times, u32* turn, u32* order,
                         const HbxWork& work, HbxTeam* team) {
    for (u32 c = threadIdx.x; c < recipe.n_codes; c += blockDim.x) turn[c] = 0;
    __syncthreads();
    for (u32 i = threadIdx.x; i < row.n; i += blockDim.x) {
        if (times[i]) atomicOr(turn + recipe.chromosome[row.columns[i]], 1u);
    }
    __syncthreads();
    u32 present = 0;
    for (u32 first = 0; first < recipe.n_codes; first += blockDim.x) {
        u32 c = first + threadIdx.x, total, there = c < recipe.n_codes ? turn[c] : 0;
        u32 place = present + hbx_block_before(there, team, &total);
        if (there) order[place] = c;
        present += total;
    }
    __syncthreads();
    u64* key = work.keys(present);
    for (u32 k = threadIdx.x; k < present; k += blockDim.x) {
        key[k] = row.draws.key(HBX_CHROM, (u32)recipe.codes[order[k]]);
    }
    hbx_smallest(key, present, present, &work.space, work.item, team);
    for (u32 k = threadIdx.x; k < present; k += blockDim.x) turn[order[work.item[k]]] = k;
    return present;
}

// One row of drafts, with room for `most` ids; returns its length.
HBX_DEVICE u32 hbx_sentence(const HbxRecipe& recipe, const HbxRow& row, const HbxWork& work, i32* out, u32 most,
                            HbxTeam* team) {
    const i64* whole = recipe.whole;
    if (threadIdx.x == 0) out[0] = (i32)whole[HBX_W_CLS];
    if (row.n == 0) return 1;
    u32 samples = (u32)whole[HBX_W_SAMPLES];
    u32 *times = work.chosen, *turn = work.list, *order = work.extra;
    hbx_draw_weighted(row, samples, work.outer_key, times, team);
    u32 present = hbx_turns(recipe, row, times, turn, order, work, team);
    // Genes that were drawn, by the turn of their chromosome and their place on it.
    u32* gene = order;
    u32 distinct = 0;
    u64* key = work.keys(row.n);
    for (u32 first = 0; first < row.n; first += blockDim.x) {
        u32 i = first + threadIdx.x, total, drawn = i < row.n && times[i] != 0;
        u32 place = distinct + hbx_block_before(drawn, team, &total);
        if (drawn) {
            u32 column = row.columns[i];
            // Dense numbers: 32 bits tell them apart.
            key[place] = (u64)turn[recipe.chromosome[column]] * recipe.n_features + (u32)recipe.place[column];
            gene[place] = i;
        }
        distinct += total;
    }
    hbx_smallest(key, distinct, distinct, &work.space, work.item, team);
    u32 carry = 0;
    for (u32 first = 0; first < distinct; first += blockDim.x) {
        u32 k = first + threadIdx.x, total, i = k < distinct ? gene[work.item[k]] : 0, own = k < distinct ? times[i] : 0;
        u32 before = carry + hbx_block_before(own, team, &total);
        if (k < distinct) {
            u32 column = row.columns[i], chromosome = (u32)recipe.chromosome[column], t = turn[chromosome];
            u32 at = 2u + 2u * t + before;
            bool opens = k == 0 || turn[recipe.chromosome[row.columns[gene[work.item[k - 1u]]]]] != t;
            bool closes = k + 1u == distinct || turn[recipe.chromosome[row.columns[gene[work.item[k + 1u]]]]] != t;
            if (opens && at - 1u < most) out[at - 1u] = (i32)(whole[HBX_W_OFFSET] + recipe.codes[chromosome]);
            for (u32 j = 0; j < own && at + j < most; j++) out[at + j] = recipe.token[column];
            if (closes && at + own < most) out[at + own] = (i32)whole[HBX_W_CLOSE];
        }
        carry += total;
    }
    u32 length = 1u + samples + 2u * present;
    return length < most ? length : most;
}

// Sentences of drawn genes as drafts of full length, and their lengths. Blocks and shared memory as token_sequences,
// without quantiles.
HBX_KERNEL __launch_bounds__(256, 2) token_weighted(const HbxRecipe* recipes, const HbxRows* batch) {
    HBX_DYN_SMEM(shared);
    __shared__ HbxTeam team;
    const HbxRecipe& recipe = *recipes;
    const HbxRows& rows = *batch;
    HbxWork work(rows, shared);
    u32 most = (u32)recipe.whole[HBX_I_LENGTH];
    for (u64 r = blockIdx.x; r < rows.n_rows; r += gridDim.x) {
        HbxRow row = hbx_row(rows, r);
        if (!hbx_has_work(recipe, rows)) row.n = 0;  // which token_genes has told
        u32 length = hbx_sentence(recipe, row, work, rows.drafts + r * most, most, &team);
        // The first sum of the next row is a barrier before anything is written that this row reads.
        if (threadIdx.x == 0) rows.lengths[r] = (i32)length;
    }
}

// ids = drafts as they are asked for: padded, or end to end. Checked: that rows fit the outputs.
HBX_KERNEL token_place(const HbxRecipe* recipes, const HbxRows* batch, u32* status, u32* any) {
    const HbxRecipe& recipe = *recipes;
    const HbxRows& rows = *batch;
    u64 most = (u64)recipe.whole[HBX_I_LENGTH];
    for (u64 r = blockIdx.x; r < rows.n_rows; r += gridDim.x) {
        i64 out = rows.starts[r], width = rows.padding == 2u ? rows.starts[r + 1] - out : rows.widths[0];
        if (out < 0 || width < 0 || !hbx_fits((u64)out, (u64)width, rows.capacity)) {
            if (threadIdx.x == 0) hbx_fail(status + r, any, HBX_BAD_PLACE);
            continue;
        }
        for (u32 k = threadIdx.x; k < (u32)width; k += blockDim.x) {
            bool there = k < (u32)rows.lengths[r];
            i64 id = there ? (i64)rows.drafts[r * most + k] : recipe.whole[HBX_I_PAD_ID];
            hbx_put_id(rows.ids, recipe.ids_bytes, (u64)out + k, id);
            if (rows.attention) rows.attention[(u64)out + k] = there;
        }
    }
}

// --- State ------------------------------------------------------------------------------------------------

HBX_DEVICE float hbx_level(const HbxRecipe& recipe, double count) {
    return hbx_f32(recipe.logged ? count : hbx_exact_log1p(count));
}

HBX_DEVICE double hbx_fixed(float level) { return rint(HBX_MUL((double)level, HBX_FIXED)); }

// The logarithm of a column in a row, 0 where it is not expressed.
HBX_CALLED float hbx_level_of(const HbxRecipe& recipe, const HbxRow& row, u32 column) {
    u32 low = 0, high = row.n;
    while (low < high) {
        u32 middle = (low + high) / 2u;
        if (row.columns[middle] < column) low = middle + 1u;
        else high = middle;
    }
    return low < row.n && row.columns[low] == column ? hbx_level(recipe, row.amount[low]) : 0.0f;
}

// item = genes of a row by falling logarithm, equal ones by their draws.
HBX_CALLED void hbx_highest(const HbxRecipe& recipe, const HbxRow& row, const HbxWork& work, HbxTeam* team) {
    u64* key = work.keys(row.n);
    for (u32 i = threadIdx.x; i < row.n; i += blockDim.x) {
        u32 bits = hbx_bits(hbx_level(recipe, row.amount[i]));
        key[i] = (u64)~bits << 32 | row.draws.words(HBX_TIES, (u32)recipe.index[row.columns[i]]).w[0];
    }
    hbx_smallest(key, row.n, row.n, &work.space, work.item, team);
    int equal = 0;
    for (u32 k = threadIdx.x + 1u; k < row.n; k += blockDim.x) equal |= key[work.item[k - 1u]] == key[work.item[k]];
    if (!__syncthreads_or(equal)) return;
    if (threadIdx.x == 0) {  // the other half of the draws decides, once in many rows
        for (u32 k = 1; k < row.n; k++) {
            u32 one = work.item[k], j = k;
            u32 own = row.draws.words(HBX_TIES, (u32)recipe.index[row.columns[one]]).w[1];
            for (; j > 0 && key[work.item[j - 1u]] == key[one]; j--) {
                u32 other = row.draws.words(HBX_TIES, (u32)recipe.index[row.columns[work.item[j - 1u]]]).w[1];
                if (other <= own) break;
                work.item[j] = work.item[j - 1u];
            }
            work.item[j] = one;
        }
    }
    __syncthreads();
}

// out[0, n) = n of some columns at random, with replacement where they are too few, and of all where there are none.
// `half` of each draw's words decides; draws with replacement are those of a block of their own.
HBX_CALLED void hbx_pick(const HbxRecipe& recipe, const HbxRow& row, const u32* some, u32 n_some, u32 n, u32 step, u32 half,
                         u32 block_number, const HbxWork& work, u32* out, HbxTeam* team) {
    if (n_some >= n) {
        u64* key = work.keys(n_some);
        for (u32 i = threadIdx.x; i < n_some; i += blockDim.x) {
            HbxWords4 words = row.draws.words(step, (u32)recipe.index[some[i]]);
            key[i] = half ? (u64)words.w[2] << 32 | words.w[3] : words.key();
        }
        hbx_smallest(key, n_some, n, &work.space, work.item, team);
        for (u32 k = threadIdx.x; k < n; k += blockDim.x) out[k] = some[work.item[k]];
    } else {
        for (u32 k = threadIdx.x; k < n; k += blockDim.x) {
            u64 key = row.draws.key(step, k, block_number);
            out[k] = n_some ? some[hbx_below_span(key, n_some)] : (u32)recipe.known[hbx_below_span(key, recipe.n_known)];
        }
    }
}

// Columns of a row of State: the first, genes by falling logarithm, and unexpressed ones at random.
HBX_DEVICE void hbx_ranked_columns(const HbxRecipe& recipe, const HbxRow& row, u32 length, u32 absent,
                                   const HbxWork& work, HbxTeam* team) {
    hbx_highest(recipe, row, work, team);
    u32 kept = row.n < length - 1u ? row.n : length - 1u, missing = length - 1u - kept;
    if (threadIdx.x == 0) work.chosen[0] = (u32)recipe.whole[HBX_R_CLS_COLUMN];
    for (u32 k = threadIdx.x; k < kept; k += blockDim.x) work.chosen[1u + k] = row.columns[work.item[k]];
    const u32* some = absent ? work.list : row.columns;
    if (missing) {
        u32 n_some = absent ? absent : row.n;
        u32* out = work.chosen + 1u + kept;
        if (absent >= missing) {
            hbx_pick(recipe, row, some, n_some, missing, HBX_ZEROS, 0, 1, work, out, team);
        } else {
            for (u32 k = threadIdx.x; k < missing; k += blockDim.x) {
                out[k] = some[hbx_below_span(row.draws.key(HBX_ZEROS, k, 1), n_some)];
            }
        }
    }
    __syncthreads();
}

// All outputs of State's embedding. Blocks and shared memory as token_weighted.
HBX_KERNEL __launch_bounds__(256, 1) token_ranked(const HbxRecipe* recipes, const HbxRows* batch, u32* status, u32* any) {
    HBX_DYN_SMEM(shared);
    __shared__ HbxTeam team;
    const HbxRecipe& recipe = *recipes;
    const HbxRows& rows = *batch;
    const i64* whole = recipe.whole;
    HbxWork work(rows, shared);
    u32 length = (u32)whole[HBX_I_LENGTH], n_expressed = (u32)whole[HBX_R_EXPRESSED];
    u32 own_tasks = n_expressed + (u32)whole[HBX_R_ABSENT], n_tasks = own_tasks + (u32)whole[HBX_R_SHARED];
    float pad = hbx_f32(recipe.fraction[HBX_F_PAD_VALUE]);
    for (u64 r = blockIdx.x; r < rows.n_rows; r += gridDim.x) {
        i64 out = rows.starts[r], width = rows.padding == 2u ? rows.starts[r + 1] - out : rows.widths[0];
        bool fits = out >= 0 && width >= (i64)length && hbx_fits((u64)out, (u64)width, rows.capacity);
        if (!fits || !hbx_has_work(recipe, rows)) {
            if (threadIdx.x == 0) hbx_fail(status + r, any, HBX_BAD_PLACE);
            continue;
        }
        HbxRow row = hbx_row(rows, r);
        u64 fixed = 0;
        for (u32 i = threadIdx.x; i < row.n; i += blockDim.x) fixed += (u64)hbx_fixed(hbx_level(recipe, row.amount[i]));
        double total = HBX_DIV((double)hbx_block_sum(fixed, &team), HBX_FIXED);
        u32 absent = hbx_absent(recipe, row, work.extra, work.list, &team);
        hbx_ranked_columns(recipe, row, length, absent, work, &team);
        for (u32 k = threadIdx.x; k < (u32)width; k += blockDim.x) {
            bool there = k < length;
            u32 column = there ? work.chosen[k] : 0;
            double share = HBX_DIV(100.0, (double)recipe.n_known);
            if (there && total > 0) {
                share = HBX_MUL(100.0, HBX_DIV((double)hbx_level_of(recipe, row, column), total));
            }
            hbx_put_id(rows.ids, recipe.ids_bytes, (u64)out + k, there ? (i64)recipe.token[column] : 0);
            if (rows.attention) rows.attention[(u64)out + k] = there;
            rows.values_out[(u64)out + k] = there ? hbx_f32(share) : pad;
        }
        __syncthreads();
        // Genes to predict.
        hbx_pick(recipe, row, row.columns, row.n, n_expressed, HBX_PICK, 0, 1, work, work.chosen, &team);
        u32 n_some = absent;
        if (whole[HBX_R_ONE_ABSENT]) {  // with those whose logarithm is below 1
            n_some = 0;
            for (u32 first = 0; first < recipe.n_known; first += blockDim.x) {
                u32 i = first + threadIdx.x, n, column = i < recipe.n_known ? (u32)recipe.known[i] : 0;
                bool below = i < recipe.n_known && hbx_level_of(recipe, row, column) < 1.0f;
                u32 place = n_some + hbx_block_before((u32)below, &team, &n);
                if (below) work.list[place] = column;
                n_some += n;
            }
            __syncthreads();
        }
        hbx_pick(recipe, row, work.list, n_some, own_tasks - n_expressed, HBX_ZEROS, 1, 3, work, work.chosen + n_expressed,
                 &team);
        __syncthreads();
        u64 sum = 0;
        for (u32 k = threadIdx.x; k < n_tasks; k += blockDim.x) {
            i64 id;
            i32 column;
            if (k < own_tasks) {
                column = (i32)work.chosen[k];
                id = recipe.token[column];
            } else {
                column = rows.shared_columns[k - own_tasks];
                id = rows.shared[k - own_tasks];
            }
            float value = column >= 0 ? hbx_level_of(recipe, row, (u32)column) : 0.0f;
            hbx_put_id(rows.task_ids, recipe.ids_bytes, r * n_tasks + k, id);
            rows.task_values[r * n_tasks + k] = value;
            sum += (u64)hbx_fixed(value);
        }
        sum = hbx_block_sum(sum, &team);
        if (threadIdx.x == 0) rows.row_totals[r] = hbx_f32(HBX_DIV((double)sum, HBX_FIXED));
    }
}

// --- CellariumGPT -----------------------------------------------------------------------------------------

// Binomial(count, share): how many of `count` words lie below the share of 2^32.
HBX_DEVICE double hbx_thin(const HbxDraws& draws, u32 index, double count, double share) {
    u64 below = (u64)floor(HBX_MUL(share, HBX_FIXED)), kept = 0;
    u32 block = 0;
    for (double left = count; left > 0; left -= 4.0, block++) {
        HbxWords4 words = draws.words(HBX_THIN, index, block);
        for (u32 k = 0; k < 4u; k++) kept += left > (double)k && words.w[k] < below;
    }
    return (double)kept;
}

// Which metadata is shown, and its codes with the others hidden. One thread.
HBX_DEVICE void hbx_metadata(const HbxRecipe& recipe, const HbxRows& rows, const HbxDraws& draws, u64 r, u8* prompts) {
    const i64* head = rows.front + r * rows.front_step;
    u32 m = recipe.n_hidden;
    u32 n = hbx_scaled(draws.words(HBX_RATIO, HBX_MAX_INDEX - 2u).w[0], m + 1u);
    for (u32 k = 0; k < m; k++) {
        bool shown;
        if (recipe.n_shown == m) {
            shown = recipe.shown[k] != 0;
        } else {
            u64 own = draws.key(HBX_PICK, HBX_MAX_INDEX - 3u - k);
            u32 before = 0;
            for (u32 j = 0; j < m; j++) before += draws.key(HBX_PICK, HBX_MAX_INDEX - 3u - j) < own;
            shown = before < n;
        }
        i64 code = head[k];
        shown = shown && code >= 0;
        prompts[k] = shown;
        rows.metadata_mask[r * m + k] = shown;
        hbx_put_id(rows.metadata_labels, recipe.ids_bytes, r * m + k, code > 0 ? code : 0);
        hbx_put_id(rows.metadata_ids, recipe.ids_bytes, r * m + k, shown ? code : code < 0 ? 0 : recipe.hidden[k]);
    }
}

// All outputs of CellariumGPT. Blocks and shared memory as token_weighted.
HBX_KERNEL __launch_bounds__(256, 2) token_prompts(const HbxRecipe* recipes, const HbxRows* batch, u32* status, u32* any) {
    HBX_DYN_SMEM(shared);
    __shared__ HbxTeam team;
    const HbxRecipe& recipe = *recipes;
    const HbxRows& rows = *batch;
    const i64* whole = recipe.whole;
    HbxWork work(rows, shared);
    u32 length = (u32)whole[HBX_I_LENGTH], n = length - recipe.n_hidden;
    bool predict = whole[HBX_P_PREDICT] != 0;
    double thinned = recipe.fraction[HBX_PF_THINNED], least = recipe.fraction[HBX_PF_MIN];
    float pad = hbx_f32(recipe.fraction[HBX_F_PAD_VALUE]);
    for (u64 r = blockIdx.x; r < rows.n_rows; r += gridDim.x) {
        i64 begin = rows.starts[r], width = rows.padding == 2u ? rows.starts[r + 1] - begin : rows.widths[0];
        HbxRow row = hbx_row(rows, r);
        bool fits = begin >= 0 && width >= (i64)length && hbx_fits((u64)begin, (u64)width, rows.capacity) &&
                    hbx_has_work(recipe, rows);
        if (!fits || n > row.n) {
            if (threadIdx.x == 0) hbx_fail(status + r, any, HBX_BAD_PLACE);
            continue;
        }
        u64 out = (u64)begin;
        double all = row.totals.all;
        double depth = all < recipe.fraction[HBX_PF_MAX] ? all : recipe.fraction[HBX_PF_MAX];
        u32 shows = (u32)whole[HBX_P_PREFIX];
        if (!predict) {
            u64* key = work.keys(row.n);
            for (u32 i = threadIdx.x; i < row.n; i += blockDim.x) {
                key[i] = row.draws.key(HBX_PICK, (u32)recipe.index[row.columns[i]]);
            }
            hbx_smallest(key, row.n, n, &work.space, work.item, &team);
            if (recipe.n_prefix) {
                u64 one = row.draws.key(HBX_RATIO, HBX_MAX_INDEX - 1u);
                u32 high = recipe.n_prefix;
                for (shows = 0; shows < high;) {
                    u32 middle = (shows + high) / 2u;
                    if (recipe.prefix_sums[middle] <= one) shows = middle + 1u;
                    else high = middle;
                }
                if (shows > n - 1u) shows = n - 1u;
            }
        }
        u64 queries = 0;
        for (u32 k = threadIdx.x; k < n; k += blockDim.x) {
            u32 i = predict ? k : work.item[k], column = row.columns[i], index = (u32)recipe.index[column];
            double x = row.amount[i], wanted = depth, count;
            bool query;
            if (predict) {
                count = rint(HBX_MUL(x, all > 0 ? HBX_DIV(depth, all) : 0.0));
                query = recipe.query[column] != 0;
            } else {
                if (thinned > 0) {
                    u64 drawn = hbx_unit_bits(row.draws.key(HBX_RATIO, index));
                    double part = HBX_DIV(HBX_MUL((double)drawn, 1.1102230246251565e-16), thinned);
                    wanted = HBX_ADD(least, HBX_MUL(part < 1 ? part : 1.0, HBX_SUB(depth, least)));
                }
                double share = HBX_DIV(wanted, all > 1 ? all : 1.0);
                share = share > 0 ? share : 0.0;
                count = share >= 1 ? x : hbx_thin(row.draws, index, x, share);
                query = k >= shows;
            }
            double highest = (double)(whole[HBX_P_VOCABULARY] - 1);
            hbx_put_id(rows.ids, recipe.ids_bytes, out + k, recipe.token[column]);
            rows.values_out[out + k] = query ? 0.0f : hbx_f32(hbx_exact_log1p(count));
            rows.query_mask[out + k] = query ? 1.0f : 0.0f;
            rows.total_counts[out + k] = hbx_f32(hbx_exact_log1p(rint(wanted)));
            rows.prompt_mask[out + k] = !query;
            hbx_put_id(rows.labels, recipe.ids_bytes, out + k, (i64)(count < highest ? count : highest));
            queries += query;
        }
        queries = hbx_block_sum(queries, &team);
        double weight = HBX_DIV(HBX_DIV(1.0, queries ? (double)queries : 1.0), (double)rows.n_rows);
        for (u32 k = threadIdx.x; k < (u32)width; k += blockDim.x) {
            bool gene = k < n;
            if (rows.attention) rows.attention[out + k] = k < length;
            rows.label_weights[out + k] = gene ? (rows.query_mask[out + k] != 0 ? hbx_f32(weight) : 0.0f)
                                               : k < length ? 0.0f : pad;
            if (gene) continue;
            float value = k < length ? 0.0f : pad;
            hbx_put_id(rows.ids, recipe.ids_bytes, out + k, 0);
            hbx_put_id(rows.labels, recipe.ids_bytes, out + k, k < length ? 0 : -100);
            rows.values_out[out + k] = value;
            rows.query_mask[out + k] = value;
            rows.total_counts[out + k] = value;
            if (k >= length) rows.prompt_mask[out + k] = 0;
        }
        if (threadIdx.x == 0) hbx_metadata(recipe, rows, row.draws, r, rows.prompt_mask + out + n);
    }
}
