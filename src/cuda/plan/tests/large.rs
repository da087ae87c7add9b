//! Plans for 2^31 to 2^40 elements: made, not run, and the kernels' index arithmetic done over.
//!
//! Apart from the tables, because here numbers are checked, not choices. What a kernel computes in 64 and
//! 32 bits that wrap is computed so here, after `cuda/{split,columns,combine,sets}.cuh`, and beside it in
//! 128 bits that do not: places of elements, their parameters, and that chunks cover a set once.

use super::*;

fn families(n: usize) -> Vec<Geometry> {
    let (k, m) = (1 << 10, 1 << 20);
    vec![
        rows(1, n + 1),
        rows(3, n / 3),
        rows(n / (4 * k), 4 * k),
        rows(n / m, m),
        group(1, 1, 1, n),
        group(1, 1, 2, n / 2),
        group(1, 1, 3, n / 3),
        group(1, 32, 4, n / 128),
        group(n / m, 2, 2, m / 4),
        batch(1, 2, n / 2),
        batch(3, 4, n / 12),
        batch(n / m, 4, m / 4),
        batch(n / 64, 64, 1),
        channels_last(1, n / 256, 256, 1),
        channels_last(1, 2, n / 2, 1),
        channels_last(32, n / (64 * k), 2 * k, 8),
        by_row(1, n / 64, 64),
        by_row(4, 64, n / 256),
    ]
}

/// As the kernel divides.
fn by(divisor: Divisor, n: u32) -> u32 {
    (((u64::from(n) * u64::from(divisor.magic)) >> 32) as u32).wrapping_add(n) >> divisor.shift
}

/// A few of 0..n, both ends and the middle among them, and those around `edge`.
fn some(n: u64, edge: u64) -> Vec<u64> {
    let near = |i: u64| [i.saturating_sub(2), i.saturating_sub(1), i, i + 1];
    let mut all: Vec<u64> = [0, edge, n / 2, n].into_iter().flat_map(near).filter(|i| *i < n).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// `struct Chunk` of split.cuh, number by number.
struct Chunk {
    seg: u64,
    first: u64,
    len: u32,
    seg_len: u32,
    /// Parameter of element `start` short of the chunk's first, beyond the set's first.
    param: u64,
    start: u32,
}

impl Chunk {
    fn new(p: &Plan, index: u64) -> Self {
        let (seg, first, len, seg_len);
        if p.schedule.pieces > 1 {
            seg = index / p.schedule.pieces;
            first = (index % p.schedule.pieces).wrapping_mul(p.schedule.chunk_len);
            len = p.schedule.seg_len.wrapping_sub(first).min(p.schedule.chunk_len) as u32;
            seg_len = len;
        } else {
            seg = index.wrapping_mul(p.schedule.segs_per_chunk);
            first = 0;
            seg_len = p.schedule.seg_len as u32;
            len = (p.schedule.segs.wrapping_sub(seg).min(p.schedule.segs_per_chunk) as u32)
                .wrapping_mul(seg_len);
        }
        let column = seg.wrapping_mul(p.schedule.seg_len) % p.shape.run + first;
        let (mut param, mut start) = (0, 0);
        if p.shape.flags & flags::PER_COLUMN != 0 {
            param = column;
        } else if p.shape.flags & flags::PER_SET == 0 {
            param = column / p.shape.span;
            // A span longer than the divisor takes is counted from its end.
            let (in_span, left) = (column % p.shape.span, p.shape.span - column % p.shape.span);
            start =
                if p.shape.span < 1 << 31 { in_span as u32 } else { (1 << 31) - left.min(1 << 31) as u32 };
        }
        Self { seg, first, len, seg_len, param, start }
    }

    fn offset(&self, p: &Plan, e: u32) -> u64 {
        if e < self.seg_len {
            return self.seg.wrapping_mul(p.schedule.seg_stride).wrapping_add(self.first + u64::from(e));
        }
        let more = by(p.schedule.by_seg, e);
        let rest = e.wrapping_sub(more.wrapping_mul(self.seg_len));
        (self.seg + u64::from(more)).wrapping_mul(p.schedule.seg_stride).wrapping_add(rest.into())
    }

    fn param(&self, p: &Plan, e: u32) -> u64 {
        match p.shape.flags {
            f if f & flags::PER_SET != 0 => 0,
            f if f & flags::PER_COLUMN != 0 => self.param + u64::from(e),
            _ => self.param + u64::from(by(p.shape.by_span, self.start.wrapping_add(e))),
        }
    }
}

/// Every chunk lies where the one before ends, and its elements and parameters are where they belong.
fn check_chunks(p: &Plan, g: &Geometry, grid: u32) {
    assert_eq!(u128::from(grid), u128::from(p.shape.sets) * u128::from(p.schedule.chunks));
    let mut end = (0, 0u128);
    for index in some(p.schedule.chunks, p.schedule.pieces) {
        let chunk = Chunk::new(p, index);
        let wide = |n: u64| u128::from(n);
        let position = match p.schedule.pieces > 1 {
            true => {
                wide(index / p.schedule.pieces) * wide(p.schedule.seg_len)
                    + wide(index % p.schedule.pieces) * wide(p.schedule.chunk_len)
            }
            false => wide(index) * wide(p.schedule.segs_per_chunk) * wide(p.schedule.seg_len),
        };
        assert!(chunk.len > 0 && chunk.len < 1 << 30, "chunk {index} has {} elements", chunk.len);
        if index == end.0 {
            assert_eq!(position, end.1, "chunk {index}");
        }
        end = (index + 1, position + u128::from(chunk.len));
        for e in some(chunk.len.into(), chunk.seg_len.into()) {
            let at = position + wide(e);
            let (row, column) = (at / wide(p.shape.run), at % wide(p.shape.run));
            assert_eq!(
                wide(chunk.offset(p, e as u32)),
                row * wide(p.shape.width) + column,
                "chunk {index}, {e}"
            );
            let param = if p.shape.flags & flags::PER_SET != 0 { 0 } else { column / wide(p.shape.span) };
            assert_eq!(wide(chunk.param(p, e as u32)), param, "parameter of chunk {index}, {e}");
        }
    }
    assert_eq!(end, (p.schedule.chunks, g.set_len() as u128), "the chunks' end");
    let last = (p.shape.sets - 1) / p.shape.sets_per_outer * p.shape.rows * p.shape.width
        + (p.shape.sets - 1) % p.shape.sets_per_outer * p.shape.run;
    let offset = (p.shape.rows - 1) * p.shape.width + p.shape.run - 1;
    assert_eq!(u128::from(last) + u128::from(offset) + 1, g.elements() as u128, "the last element");
}

/// Tiles cover all columns, chunks all rows; counts of rows fit 32 bits, and columns find their sets.
fn check_tiles(p: &Plan, lanes: usize, grid: u32) {
    let wide = |n: u64| u128::from(n);
    let tiles = |v: u64| p.shape.width.div_ceil(u64::from(p.schedule.lanes) * v);
    let fits = |v: u64| u128::from(grid) == wide(tiles(v)) * wide(p.schedule.chunks) * wide(p.shape.outer);
    assert!([1, lanes as u64 / 2, lanes as u64].into_iter().any(fits), "{grid} blocks");
    assert!(
        wide(p.schedule.chunk_rows) * wide(p.schedule.chunks) >= wide(p.shape.rows),
        "rows without a chunk"
    );
    assert!(
        wide(p.schedule.chunk_rows) * wide(p.schedule.chunks - 1) < wide(p.shape.rows)
            && p.schedule.chunk_rows < 1 << 32,
        "empty chunks"
    );
    for column in some(p.shape.width, p.shape.run).into_iter().chain(some(p.shape.width, 1 << 31)) {
        for (divisor, exact) in [(p.schedule.by_seg, p.shape.run), (p.shape.by_span, p.shape.span)] {
            let quotient = if column < 1 << 31 { by(divisor, column as u32).into() } else { column / exact };
            assert_eq!(quotient, column / exact, "column {column}");
        }
    }
}

/// Parts of each set and each parameter lie within the scratch memory, and all have a thread.
fn check_parts(p: &Plan, kernel: Kernel, threads: u128, bytes: usize) {
    let (wide, bytes) = (|n: u64| u128::from(n), bytes as u128);
    let room = |at: Option<usize>| at.map(|at| (p.workspace - at) as u128 / bytes);
    let (parts, values) = match kernel {
        Kernel::ReduceParams => {
            assert!(
                threads * wide(p.schedule.reduce_columns.into()) >= wide(p.shape.params),
                "parameters without a thread"
            );
            assert!(
                wide(p.shape.params) * wide(p.schedule.param_span) <= wide(p.schedule.param_width),
                "parts of the last parameter"
            );
            assert!(
                room(p.scratch.param_parts)
                    >= Some(2 * wide(p.schedule.copies) * wide(p.schedule.param_width))
            );
            return;
        }
        Kernel::CombineMoments => (p.scratch.part_moments, 3),
        _ => (p.scratch.part_sums, 2),
    };
    assert!(threads >= wide(p.shape.sets) * wide(p.schedule.combine_lanes.into()), "sets without a thread");
    assert!(
        wide(p.shape.sets_per_outer) * wide(p.schedule.part_run) <= wide(p.schedule.part_width),
        "parts of the last set"
    );
    let total = wide(p.shape.outer) * wide(p.schedule.part_chunks) * wide(p.schedule.part_width);
    assert!(room(parts) >= Some(values * total), "{values} times {total} parts in {} bytes", p.workspace);
}

fn check(p: &Plan, r: &Request) {
    for l in &p.launches {
        let (kernel, threads) = (l.entry.kernel(), u128::from(l.grid) * u128::from(l.block));
        use Kernel::*;
        match kernel {
            SplitMoments | SplitForward | SplitSums | SplitBackward => check_chunks(p, &r.geometry, l.grid),
            ColumnMoments | ColumnForward | ColumnSums | ColumnBackward => {
                check_tiles(p, 16 / r.element.bytes(), l.grid)
            }
            CombineMoments | CombineSums => check_parts(p, kernel, threads, r.element.accumulator_bytes()),
            // A block for each group of parameters.
            ReduceParams => check_parts(p, kernel, l.grid.into(), r.element.accumulator_bytes()),
            // Tiles of columns over slabs of the outer dimension.
            SplitColumnSums => {
                let slabs = p.shape.outer.div_ceil(p.schedule.chunk_rows);
                assert_eq!(u128::from(l.grid), u128::from(p.schedule.part_width) * u128::from(slabs));
            }
            MoveRunning => assert!(threads >= u128::from(p.shape.sets_per_outer)),
            // A set on chip: numbers of its elements, a whole round beyond its end too, fit 32 bits.
            _ => assert!(p.shape.set_len + u64::from(l.block) * u64::from(l.cluster) * 64 < 1 << 31),
        }
    }
}

#[test]
fn large_tensors_are_counted_right() {
    let (mut plans, mut refused) = (0, 0);
    let given = ForwardNeeds { given: true, ..FORWARD };
    let fixed = BackwardNeeds { fixed: true, ..BACKWARD };
    for (power, element) in (31..=40).flat_map(|power| DTYPES.map(|element| (power, element))) {
        for (geometry, device) in families(1 << power).into_iter().flat_map(|g| DEVICES.map(|d| (g, d))) {
            for aligned in [true, false] {
                let r = request(geometry, element, aligned);
                let mut made = vec![
                    forward(&r, &device, &FORWARD),
                    forward(&r, &device, &given),
                    backward(&r, &device, &BACKWARD),
                    backward(&r, &device, &fixed),
                ];
                if geometry.one_param_per_set() {
                    made.push(gradient_sums(&r, &device));
                    made.push(input_gradient(&r, &device, geometry.set_len() as f64));
                }
                for plan in made {
                    match plan {
                        Ok(plan) => check(&plan, &r),
                        // CUDA's bound on blocks: an error, not a number cut short.
                        Err(e) => {
                            assert!(e.to_string().contains("blocks, expected at most 2147483647"), "{e}");
                            refused += 1;
                        }
                    }
                    plans += 1;
                }
            }
        }
    }
    println!("large: {plans} plans, {refused} of them refused");
    // Tens of thousands; what is refused has 2^31 blocks' worth of work in one launch.
    assert!(plans > 10_000 && refused * 10 < plans, "{refused} of {plans}");
}

const DEVICES: [DeviceProperties; 3] = [SM70, SM80, SM90];
const DTYPES: [Element; 4] = [Element::F32, Element::F16, Element::BF16, Element::F64];
