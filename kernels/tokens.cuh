// What kernels of tokens are given (dtypes in hbx_gpu/tokens/_device/records.py), and memory for one row.
#pragma once
#include "draws.cuh"
#include "smallest.cuh"

#define HBX_TOO_MANY 512u  // counts of a row sum to more than 2^53

// A recipe that was compiled for a dataset: the same for all batches. Tables by column have n_features entries.
struct HbxRecipe {
    const i32* column;          // where a column's counts go; -1: nowhere
    const i32* token;           // id of a column
    const double* scale;        // of its gene
    const i32* index;           // its number in draws
    const i32* known;           // columns with a token, ascending
    const i64* whole;           // HBX_I_...
    const double* fraction;     // HBX_F_...
    const double* quantiles;    // of bin edges
    const double* ratios;       // probabilities of masks
    const i64* protect;         // ids that are never hidden
    const float* front_values;  // n_front
    const float* back_values;   // n_back
    const i64* back;            // ids of tokens after the genes
    const i32* chromosome;      // number of a column's chromosome among `codes`
    const i32* place;           // of a column among all starts
    const i64* codes;           // of chromosomes, ascending
    const u64* prefix_sums;
    const u8* shown;  // metadata
    const u8* query;  // by column
    const i64* hidden;  // metadata ids that hide
    u32 n_features;
    u32 n_known;
    u32 n_quantiles;
    u32 n_ratios;
    u32 n_protect;
    u32 n_codes;
    u32 n_prefix;
    u32 n_shown;
    u32 n_hidden;
    u32 zeros;   // every known gene is in every row
    u32 logged;  // values are logarithms, not counts
    u32 ids_bytes;  // of ids and labels in outputs: 4 or 8
};

// Rows of one batch, on their way: where they lie, what is known of them, and where tokens go.
struct HbxRows {
    const i32* indices;  // flat CSR; -1: dropped
    const void* values;
    const i64* offsets;   // n_rows + 1
    const i64* cells;     // n_rows
    const i64* front;     // ids before the genes, front_step apart from row to row
    const i64* shared;    // ids that all rows predict
    const i32* shared_columns;
    const i64* room;      // n_rows + 1: places of each row's known genes
    u32* genes;           // known genes, and their counts
    double* counts;
    u32* n_genes;         // n_rows, and so on
    double* totals;
    double* known_totals;
    i32* lengths;
    i32* gen_lengths;
    i64* starts;          // n_rows + 1: first token of each row
    i64* widths;          // 0 of rows, 1 of generated parts, 2 tokens of all rows, 3 of the longest
    i32* drafts;          // n_rows rows of full length, of recipes whose lengths are known last
    u8* work;             // work_bytes for each block
    u8* attention;        // 1 at tokens; null where rows lie end to end
    i32* bounds;          // n_rows + 1, where they do; else null
    void* ids;
    float* values_out;
    float* counts_out;
    void* labels;
    float* masked_values;
    u8* mask;
    void* gen_ids;
    float* gen_values;
    void* task_ids;
    float* task_values;
    float* row_totals;
    float* query_mask;
    float* total_counts;
    u8* prompt_mask;
    float* label_weights;
    void* metadata_ids;
    void* metadata_labels;
    u8* metadata_mask;
    u64 n_elements;
    u64 n_places;         // of genes and counts
    u64 capacity;         // tokens that outputs have room for
    u64 gen_capacity;
    u64 work_bytes;
    u64 seed;
    double gen_ratio;
    u32 epoch;
    u32 n_rows;
    u32 value_type;
    u32 front_step;
    u32 padding;          // 0 longest, 1 full length, 2 end to end
    u32 multiple;         // widths are multiples of this
    u32 longest;          // room of work for a row: genes of any row, known genes, and tokens
    u32 n_shared;         // keys that shared memory has room for
};

// Places in `whole` and `fraction` (hbx_gpu/tokens/_numbers.py).
enum {
    HBX_I_ORDER, HBX_I_KEEP, HBX_I_CUT_RANDOM, HBX_I_RANK, HBX_I_SCALED, HBX_I_FILL, HBX_I_FILL_TO, HBX_I_VALUE,
    HBX_I_NORM, HBX_I_CURVE, HBX_I_SIDE, HBX_I_TORCH_EDGES, HBX_I_COUNTS, HBX_I_N_FRONT, HBX_I_N_BACK, HBX_I_DEPTH,
    HBX_I_DEPTH_FIRST, HBX_I_DEPTH_SECOND, HBX_I_DEPTH_DROP, HBX_I_PAD_ID, HBX_I_MASK, HBX_I_MASK_FRONT,
    HBX_I_MASK_SHORT, HBX_I_MASK_ID, HBX_I_REPLACE_FIRST, HBX_I_REPLACE_SPAN, HBX_I_MASKED_BELOW,
    HBX_I_REPLACED_BELOW, HBX_I_LENGTH, HBX_I_KIND
};
enum { HBX_F_RANK_TARGET, HBX_F_TARGET, HBX_F_CLIP, HBX_F_DEPTH_NUMBER, HBX_F_PAD_VALUE, HBX_F_MASK_VALUE };

// Memory of a block for one row: lists with room for `longest` entries each, the first three in shared memory where
// a row is short enough. Their keys are written to `key`.
struct HbxWork {
    u64* key;
    u64* outer_key;
    u32* item;
    u32* chosen;
    u32* list;
    u32* extra;
    HbxSpace space;

    HBX_DEVICE HbxWork(const HbxRows& rows, u8* shared) {
        u64 n = rows.longest;
        u8* at = rows.work + (u64)blockIdx.x * rows.work_bytes;
        key = (u64*)shared;
        space.shared_a = key + rows.n_shared;
        space.shared_b = space.shared_a + rows.n_shared;
        space.n_shared = rows.n_shared;
        outer_key = (u64*)at;
        space.a = outer_key + n;
        space.b = space.a + n;
        item = (u32*)(space.b + n);
        chosen = item + n;
        list = chosen + n;
        extra = list + n;
    }
    // Where n keys are written.
    HBX_DEVICE u64* keys(u32 n) const { return n <= space.n_shared ? key : outer_key; }
};
#define HBX_WORK_ENTRY 40u  // bytes of work for each entry of `longest`

// Whether the lists of a block are as long as any row may need them; longest_row of hbx_gpu/tokens/_device/outputs.py.
HBX_DEVICE bool hbx_has_work(const HbxRecipe& recipe, const HbxRows& rows) {
    const i64* whole = recipe.whole;
    u64 length = (u64)whole[HBX_I_LENGTH], kind = (u64)whole[HBX_I_KIND], need = length;
    if (recipe.n_codes > need) need = recipe.n_codes;
    if ((recipe.n_features + 31u) / 32u > need) need = (recipe.n_features + 31u) / 32u;
    if (recipe.zeros || (kind == 0 && whole[HBX_I_FILL_TO] > 0)) {
        if (recipe.n_known + length > need) need = recipe.n_known + length;
    } else if (kind == 2u) {  // tasks stand where a sequence has its order
        u64 tasks = (u64)(whole[1] + whole[2] + whole[3]);
        if (tasks > need) need = tasks;
        if (recipe.n_known > need) need = recipe.n_known;
    }
    return need <= rows.longest;
}

HBX_DEVICE void hbx_put_id(void* ids, u32 bytes, u64 at, i64 id) {
    if (bytes == 8u) {
        ((i64*)ids)[at] = id;
    } else {
        ((i32*)ids)[at] = (i32)id;
    }
}

// One row of a batch as kernels meet it.
struct HbxRow {
    const u32* columns;
    const double* amount;
    u32 n;
    HbxTotals totals;
    HbxDraws draws;
};

HBX_DEVICE HbxRow hbx_row(const HbxRows& rows, u64 r) {
    HbxRow row;
    row.columns = rows.genes + rows.room[r];
    row.amount = rows.counts + rows.room[r];
    row.n = rows.n_genes[r];
    row.totals.all = rows.totals[r];
    row.totals.known = rows.known_totals[r];
    row.totals.kept = 0;
    row.draws.seed = rows.seed;
    row.draws.cell = (u64)rows.cells[r];
    row.draws.epoch = rows.epoch;
    return row;
}

// list = known columns that a row does not express, ascending; returns how many. `bits`: a bit for each column. All
// threads; a barrier comes before the end.
HBX_CALLED u32 hbx_absent(const HbxRecipe& recipe, const HbxRow& row, u32* bits, u32* list, HbxTeam* team) {
    u32 n_words = (recipe.n_features + 31u) / 32u, found = 0;
    for (u32 w = threadIdx.x; w < n_words; w += blockDim.x) bits[w] = 0;
    __syncthreads();
    for (u32 i = threadIdx.x; i < row.n; i += blockDim.x) {
        atomicOr(bits + row.columns[i] / 32u, 1u << (row.columns[i] & 31u));
    }
    __syncthreads();
    for (u32 first = 0; first < recipe.n_known; first += blockDim.x) {
        u32 i = first + threadIdx.x, total;
        u32 column = i < recipe.n_known ? (u32)recipe.known[i] : 0;
        bool absent = i < recipe.n_known && !(bits[column / 32u] >> (column & 31u) & 1u);
        u32 place = found + hbx_block_before((u32)absent, team, &total);
        if (absent) list[place] = column;
        found += total;
    }
    __syncthreads();
    return found;
}
