//! Tables of plans: what runs for a geometry on a device, and what it moves.

use super::*;
use crate::cuda::entry::module::Module;
use crate::request::Norm;
use std::collections::HashSet;

mod large;
mod roofline;

const SM70: DeviceProperties = DeviceProperties { capability: 70, multiprocessors: 80, shared: 96 << 10 };
const SM80: DeviceProperties = DeviceProperties { capability: 80, multiprocessors: 108, shared: 163 << 10 };
const SM90: DeviceProperties = DeviceProperties { capability: 90, multiprocessors: 132, shared: 227 << 10 };

const FORWARD: ForwardNeeds = ForwardNeeds { output: true, given: false, keep: true, momentum: None };
const BACKWARD: BackwardNeeds =
    BackwardNeeds { dx: true, dweight: true, dbias: true, as_x: true, fixed: false, around: false };

fn rows(outer: usize, n: usize) -> Geometry {
    Geometry { outer, rows: 1, width: n, run: n, weight_by: WeightBy::Column { span: 1 }, center: true }
}

fn group(outer: usize, groups: usize, channels: usize, space: usize) -> Geometry {
    let weight_by = WeightBy::Column { span: space };
    let run = channels * space;
    Geometry { outer, rows: 1, width: groups * run, run, weight_by, center: true }
}

fn batch(samples: usize, channels: usize, space: usize) -> Geometry {
    let weight_by = WeightBy::Column { span: space };
    Geometry { outer: 1, rows: samples, width: channels * space, run: space, weight_by, center: true }
}

fn channels_last(outer: usize, rows: usize, width: usize, run: usize) -> Geometry {
    Geometry { outer, rows, width, run, weight_by: WeightBy::Column { span: 1 }, center: true }
}

fn by_row(outer: usize, rows: usize, width: usize) -> Geometry {
    Geometry { outer, rows, width, run: 1, weight_by: WeightBy::Row, center: true }
}

fn request(geometry: Geometry, element: Element, aligned: bool) -> Request {
    Request {
        name: "test",
        geometry,
        element,
        eps: 1e-5,
        align: if aligned { 16 } else { 2 },
        params_aligned: true,
        params_plain: true,
        weight: true,
        bias: true,
        fusion: Fusion::default(),
        residual: false,
        skip: false,
        gate: false,
        x_blocks: None,
    }
}

/// Kernels of a plan with their blocks and shared bytes, and passes over the tensor.
fn summary(plan: &Plan, r: &Request) -> (Vec<(Kernel, u32, u32, u32)>, usize) {
    let launches = plan.launches.iter();
    let kernels = launches.map(|l| (l.entry.kernel(), l.block, l.shared, l.cluster)).collect();
    (kernels, plan.traffic / (r.geometry.elements() * r.element.bytes()).max(1))
}

#[test]
fn divisors_are_exact() {
    let dividends = [0u64, 1, 2, 3, 48, 49, 50, 12345, 65535, 65536, (1 << 31) - 2, (1 << 31) - 1];
    for d in [1usize, 2, 3, 5, 7, 49, 64, 3136, 65537, (1 << 30) + 1, (1 << 31) - 1, 1 << 31, 1 << 40] {
        let by = Divisor::new(d);
        for n in dividends.into_iter().chain([d as u64 - 1, d as u64, d as u64 + 1]).filter(|n| *n < 1 << 31)
        {
            // The kernel's arithmetic: the sum wraps nowhere below 2^32.
            let got = (((n * by.magic as u64) >> 32) + n) >> by.shift;
            assert_eq!(got, n / d as u64, "{n} / {d}");
        }
    }
}

#[test]
fn every_entry_has_a_name_of_its_own_and_a_file() {
    let names: HashSet<_> = Entry::all().map(Entry::name).collect();
    assert_eq!(names.len(), Entry::COUNT);
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
    let stems: HashSet<_> = Entry::all().map(|entry| entry.module().stem()).collect();
    assert_eq!(stems.len(), Module::COUNT);
    for stem in stems {
        let file = folder.join(stem).with_extension("cu");
        assert!(file.exists(), "{}", file.display());
    }
}

/// Bytes that a group takes of shared memory.
const SLOTS: u32 = 2 * (3 * 16 + 3 * 8) * 4 + 16;

#[test]
fn forward_climbs_the_ladder() {
    use Kernel::*;
    let one = |kernel, block, held: u32, cluster| (vec![(kernel, block, SLOTS + held, cluster)], 2);
    let kept = |block, cluster| {
        (vec![(if cluster == 1 { ForwardKept } else { ForwardKeptCluster }, block, SLOTS, cluster)], 2)
    };
    let split = || {
        let chunk = SLOTS + (16 << 10);
        let combine = (CombineMoments, 256, 32 * 20, 1);
        (vec![(SplitMoments, 256, chunk, 1), combine, (SplitForward, 256, chunk, 1)], 3)
    };
    let few_chunks = || {
        let (kernels, passes) = split();
        (
            kernels.into_iter().map(|k| if k.0 == CombineMoments { (k.0, k.1, 0, k.3) } else { k }).collect(),
            passes,
        )
    };
    let table = [
        // Bytes of a set: 32 (of which a block has 128, kept apart; or 32, where sets are few), 2 Ki, 4 Ki, 32 Ki.
        (SM70, rows(100_000, 16), true, one(ForwardSeveral, 256, 128 * 160, 1)),
        (SM70, rows(1000, 16), true, one(ForwardSeveral, 64, 32 * 160, 1)),
        (SM70, rows(10_000, 1024), true, one(ForwardSeveral, 256, 8 * 2080, 1)),
        (SM70, rows(1000, 2048), true, kept(64, 1)),
        (SM80, rows(1000, 16384), true, kept(512, 1)),
        (SM90, rows(1000, 16384), true, kept(512, 1)),
        // 64 Ki, 256 Ki, 512 Ki, 4 Mi.
        (SM70, rows(1000, 32768), true, one(ForwardHeld, 512, 64 << 10, 1)),
        (SM90, rows(1000, 32768), true, kept(64, 8)),
        (SM90, rows(1000, 65536), true, kept(128, 8)),
        (SM90, rows(1000, 131072), true, kept(256, 8)),
        (SM90, rows(1000, 262144), true, one(ForwardCluster, 256, 64 << 10, 8)),
        (SM80, rows(1000, 131072), true, few_chunks()),
        (SM90, rows(1000, 2097152), true, split()),
        // Group, instance and batch norm alike: VAE's groups, 200 KB channels.
        (SM90, group(1, 32, 4, 1 << 20), true, split()),
        (SM90, group(16, 32, 16, 4096), true, kept(128, 8)),
        (SM90, group(16, 512, 1, 4096), true, kept(128, 1)),
        (SM90, batch(32, 256, 3136), true, kept(256, 8)),
        // 14x14 images have accesses of 8 bytes.
        (SM90, batch(256, 64, 196), true, kept(128, 8)),
        (SM90, batch(32, 64, 196), true, kept(128, 1)),
        // Scalars too.
        (SM90, rows(1000, 32767), true, one(ForwardHeld, 512, 65536, 1)),
        (SM90, rows(1000, 32768), false, one(ForwardHeld, 512, 65536, 1)),
    ];
    for (device, geometry, aligned, expected) in table {
        let r = request(geometry, Element::BF16, aligned);
        let plan = forward(&r, &device, &FORWARD).unwrap();
        assert_eq!(summary(&plan, &r), expected, "{geometry:?} sm_{}", device.capability);
    }
}

/// x read once, the output or its gradient written once (and the gate alike, which passes do not count); what is refused is left to candle's operations.
#[test]
fn gates_before_the_norm_are_in_registers() {
    use Kernel::*;
    let fusion = Fusion { gate: Some(Gate::Before), ..Fusion::default() };
    let rms = |n| Geometry { center: false, ..rows(512, n) };
    let of = |n, element| Request { fusion, gate: true, bias: false, ..request(rms(n), element, true) };
    let needs = BackwardNeeds { dbias: false, around: true, ..BACKWARD };
    for (device, n, block) in [(SM70, 64, 256), (SM80, 4096, 256), (SM90, 5120, 512), (SM90, 8192, 512)] {
        let r = of(n, Element::BF16);
        let (kernels, passes) = summary(&forward(&r, &device, &FORWARD).unwrap(), &r);
        assert_eq!((kernels[0].0, kernels[0].1, kernels.len(), passes), (GatedForward, block, 1, 2), "{n}");
        let (kernels, passes) = summary(&backward(&r, &device, &needs).unwrap(), &r);
        assert_eq!(kernels.iter().map(|k| k.0).collect::<Vec<_>>(), [GatedBackward, ReduceParams], "{n}");
        assert_eq!((kernels[0].1, passes), (block, 3), "{n}");
    }
    let takes = |geometry, fusion, element| {
        takes_gate_before(&Norm { fusion, ..Norm::new("test", geometry, 1e-5) }, element)
    };
    for (element, most) in [(Element::F16, 8192), (Element::F32, 8192), (Element::F64, 4096)] {
        assert!(takes(rms(most), fusion, element) && !takes(rms(most + 1), fusion, element), "{element:?}");
    }
    assert!(!takes(rows(512, 64), fusion, Element::F32), "a norm that centers");
    assert!(!takes(rms(64), Fusion { skip: true, ..fusion }, Element::F32), "a skip");
    // What no caller asks for is an error, not another result.
    let r = of(64, Element::F32);
    assert!(forward(&Request { bias: true, ..r }, &SM80, &FORWARD).is_err());
    assert!(forward(&r, &SM80, &ForwardNeeds { given: true, ..FORWARD }).is_err());
    assert!(backward(&r, &SM80, &BackwardNeeds { fixed: true, ..needs }).is_err());
}

#[test]
fn backward_climbs_the_ladder() {
    use Kernel::*;
    let kernels = |geometry, device: &DeviceProperties, needs: &BackwardNeeds| {
        let r = request(geometry, Element::BF16, true);
        let (kernels, passes) = summary(&backward(&r, device, needs).unwrap(), &r);
        (kernels.into_iter().map(|k| k.0).collect::<Vec<_>>(), passes)
    };
    let dx = BackwardNeeds { dweight: false, dbias: false, ..BACKWARD };
    let fixed = BackwardNeeds { fixed: true, ..BACKWARD };
    let table = [
        (SM70, rows(1000, 16), BACKWARD, vec![BackwardRows, ReduceParams], 3),
        (SM90, rows(4096, 1023), BACKWARD, vec![BackwardPlain, ReduceParams], 3),
        (SM90, rows(8192, 4096), BACKWARD, vec![BackwardRows, ReduceParams], 3),
        (SM90, rows(8192, 4096), dx, vec![BackwardRows], 3),
        (SM80, rows(1000, 16384), BACKWARD, vec![BackwardPlainWide, ReduceParams], 3),
        (SM90, rows(1000, 65536), BACKWARD, vec![BackwardPlainCluster, ReduceParams], 3),
        // One row is all there is of the parameters' gradients, unless they are of another dtype.
        (SM90, rows(1, 4096), BACKWARD, vec![BackwardRows], 3),
        (SM90, rows(1, 65536), BACKWARD, vec![BackwardPlainCluster], 3),
        (SM90, rows(1, 4096), BackwardNeeds { as_x: false, ..BACKWARD }, vec![BackwardRows, ReduceParams], 3),
        // Columns with gradients of their own and no cluster: sums and gradients in one pass of two.
        (
            SM80,
            rows(1000, 65536),
            BACKWARD,
            vec![SplitColumnSums, ReduceParams, CombineSums, SplitBackward],
            5,
        ),
        // dx by the same kernel, whether or not parameters are wanted.
        (SM80, rows(1000, 30000), dx, vec![BackwardSets], 3),
        (SM80, rows(1000, 30000), BACKWARD, vec![SplitColumnSums, ReduceParams, BackwardSets], 5),
        (SM90, group(16, 32, 16, 4096), BACKWARD, vec![BackwardSetsCluster, ReduceParams], 3),
        (
            SM80,
            group(16, 32, 16, 4096),
            BACKWARD,
            vec![SplitSums, CombineSums, ReduceParams, SplitBackward],
            5,
        ),
        (SM90, group(16, 512, 1, 4096), BACKWARD, vec![BackwardSets, ReduceParams], 3),
        // Batch norm's sums are its parameters' gradients.
        (SM90, batch(32, 256, 3136), BACKWARD, vec![BackwardSetsCluster], 3),
        (SM90, batch(256, 64, 12544), BACKWARD, vec![SplitSums, CombineSums, SplitBackward], 5),
        (SM90, channels_last(1, 100352, 256, 1), BACKWARD, vec![ColumnSums, CombineSums, ColumnBackward], 5),
        (
            SM90,
            channels_last(32, 3136, 256, 8),
            BACKWARD,
            vec![ColumnSums, CombineSums, ReduceParams, ColumnBackward],
            5,
        ),
        (
            SM90,
            by_row(32, 96, 3136),
            BACKWARD,
            vec![ColumnSums, CombineSums, ColumnBackward, ReduceParams],
            5,
        ),
        // Evaluation: one pass of three.
        (SM90, batch(32, 256, 3136), fixed, vec![SplitSums, CombineSums], 3),
        (SM90, channels_last(1, 100352, 256, 1), fixed, vec![ColumnSums, CombineSums], 3),
        (SM90, batch(32, 256, 3136), BackwardNeeds { fixed: true, ..dx }, vec![SplitBackward], 2),
    ];
    for (device, geometry, needs, expected, passes) in table {
        let got = kernels(geometry, &device, &needs);
        assert_eq!(got, (expected, passes), "{geometry:?} sm_{} {needs:?}", device.capability);
    }
}

/// Geometries from nothing to more than 2^31 elements.
fn sweep() -> Vec<Geometry> {
    let mut all = Vec::new();
    for n in
        [1, 2, 3, 7, 8, 31, 64, 100, 768, 1023, 4096, 8192, 8193, 12288, 16384, 40000, 65536, 131071, 1 << 20]
    {
        all.extend([rows(3, n), rows(70_000, n), group(5, 2, 3, n), group(2, 3, n, 1), batch(9, 4, n)]);
        all.extend([
            channels_last(1, n, 40, 1),
            channels_last(3, 50, n, 1),
            channels_last(2, n, 36, 9),
            by_row(2, 5, n),
        ]);
        all.push(by_row(2, n, 33));
    }
    all.extend([
        rows(1 << 20, 1 << 12),
        batch(1 << 10, 3, 1 << 21),
        rows(1, (1 << 32) + 1),
        by_row(1, 2, 1 << 31),
    ]);
    all
}

#[test]
fn launches_are_within_bounds() {
    for geometry in sweep() {
        for (element, aligned, device) in [Element::F32, Element::BF16, Element::F64]
            .into_iter()
            .flat_map(|e| [true, false].map(|a| (e, a)))
            .flat_map(|(e, a)| [SM70, SM80, SM90].map(|d| (e, a, d)))
        {
            let r = request(geometry, element, aligned);
            let what = format!("{geometry:?} {element:?} aligned {aligned} sm_{}", device.capability);
            let forward = forward(&r, &device, &FORWARD).expect(&what);
            let backward = backward(&r, &device, &BACKWARD).expect(&what);
            for l in forward.launches.iter().chain(&backward.launches) {
                assert!(l.grid > 0 && l.block % 32 == 0 && l.block > 0 && l.block <= 512, "{what}: {l:?}");
                assert!(l.shared <= device.shared, "{what}: {l:?}");
                assert!(l.shared <= 48 << 10 || l.entry.needs_shared_opt_in(), "{what}: {l:?}");
                assert!(
                    l.grid % l.cluster == 0 && (l.cluster == 1 || device.capability >= 90),
                    "{what}: {l:?}"
                );
                assert!(l.entry.module().needs_capability() <= device.capability, "{what}: {l:?}");
            }
            let tensor = geometry.elements() * element.bytes();
            assert!((2..=3).contains(&(forward.traffic / tensor)), "{what}: forward");
            assert!((3..=5).contains(&(backward.traffic / tensor)), "{what}: backward");
            // What fits in the registers of a block is read once and written once.
            let contiguous = geometry.rows == 1 && geometry.weight_by != WeightBy::Row;
            if contiguous && geometry.set_len() * element.bytes() <= 64 << 10 {
                assert_eq!(forward.traffic, 2 * tensor, "{what}");
            }
        }
    }
}

#[test]
fn the_batch_does_not_choose_the_kernels() {
    // Nor which lanes add up a set; how many sets a block of the forward has, it may.
    let kernels = |plan: Plan| {
        let of = |l: &Launch| match l.entry.kernel() {
            Kernel::ForwardSeveral | Kernel::ForwardHeld => (l.entry, plan.schedule.lanes, 0),
            _ => (l.entry, l.block, l.shared),
        };
        plan.launches.iter().map(of).collect::<Vec<_>>()
    };
    for geometry in sweep().into_iter().filter(|g| g.outer > 1) {
        for device in [SM70, SM80, SM90] {
            let of = |outer| request(Geometry { outer, ..geometry }, Element::F16, true);
            let forward = |outer| kernels(forward(&of(outer), &device, &FORWARD).unwrap());
            assert_eq!(forward(2), forward(1000), "{geometry:?}");
            let dx = BackwardNeeds { dweight: false, dbias: false, ..BACKWARD };
            let backward = |outer| kernels(backward(&of(outer), &device, &dx).unwrap());
            assert_eq!(backward(2), backward(1000), "{geometry:?}");
        }
    }
}

#[test]
fn nothing_launches_nothing_but_zeros() {
    let r = request(rows(0, 6), Element::F32, true);
    assert!(forward(&r, &SM80, &FORWARD).unwrap().launches.is_empty());
    let plan = backward(&r, &SM80, &BACKWARD).unwrap();
    assert_eq!(summary(&plan, &r).0.iter().map(|k| k.0).collect::<Vec<_>>(), [Kernel::ReduceParams]);
}
