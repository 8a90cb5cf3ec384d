/* Template body: declares what sorts tiles. It is compiled once for all kernels, in kernels/sort.c: inlined into each
 * of them, the networks would be most of what there is to compile, and no faster.
 *
 * Included by   tile_body.h: once per working type and CPU variant of a kernel.
 * Expects       what real.h sets, and network.h.
 * Leaves        no macro of its own. */
#include "kernels/simd/vector_body.h"

/* Sorts every column of a tile of keys, which has room for lns_network_rows(n) rows. */
void VNAME(lns_sort_tile)(key *keys, int64_t n);

/* Sorts the columns of keys [rows, LANES], whole runs. */
void VNAME(lns_sort_rows)(key *keys, int64_t rows);

/* Merges keys[0..2^stages) with keys[2^stages..rows), 2^stages < rows <= 2^(stages + 1); whole runs. */
void VNAME(lns_merge_rows)(key *keys, int stages, int64_t rows);

/* Sorts a tile of n <= LNS_RUN rows and records what each comparator swapped. */
void VNAME(lns_sort_recorded)(key *keys, int64_t n, VNAME(mask) * masks);

/* Undoes a recorded network; what stands in the rows that filled it up does not matter. */
void VNAME(lns_sort_undo)(key *keys, int64_t n, VNAME(mask) * masks);
