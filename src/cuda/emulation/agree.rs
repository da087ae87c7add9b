//! Rust and CUDA state the same layout, flags, codes, launch bounds and sizes in shared memory.
//!
//! Every field and flag is named on both sides (`cuda/emulation/agree.cpp` has the other one); a field
//! that is in neither list shows as bytes that no field covers.

use super::{find, Emulated};
use crate::cuda::entry::{Element, Entry};
use crate::cuda::machine::Machine;
use crate::cuda::params::{flags, Arguments, Divisor, Params, Schedule, Shape};
use crate::cuda::plan::{activation_code, bounds, held, split, Launch};
use crate::fusion::Activation;
use half::{bf16, f16};
use std::collections::BTreeMap;
use std::ffi::{c_char, CStr, CString};
use std::mem::offset_of;

extern "C" {
    fn norm_emulation_fact(n: usize, name: *mut *const c_char, value: *mut u64, bytes: *mut u64) -> bool;
    fn norm_emulation_code(dtype: *const c_char) -> u64;
    fn norm_emulation_to_f16(v: f32) -> u16;
    fn norm_emulation_to_bf16(v: f32) -> u16;
    fn norm_emulation_of_f16(bits: u16) -> f32;
    fn norm_emulation_of_bf16(bits: u16) -> f32;
}

const ELEMENTS: [(&str, Element); 4] =
    [("f32", Element::F32), ("f16", Element::F16), ("bf16", Element::BF16), ("f64", Element::F64)];

/// Names with a number, and with a size where it is a field.
type Facts = BTreeMap<String, (u64, u64)>;

fn of_cuda() -> Facts {
    let mut facts = Facts::new();
    let (mut name, mut value, mut bytes) = (std::ptr::null(), 0, 0);
    // SAFETY: it writes the three, of which the name is a literal, and only where it returns true.
    while unsafe { norm_emulation_fact(facts.len(), &mut name, &mut value, &mut bytes) } {
        // SAFETY: as above.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
        assert_eq!(facts.insert(name, (value, bytes)), None, "a fact that is listed twice");
    }
    facts
}

/// Fields of a struct as facts: where they lie, and their sizes.
macro_rules! fields {
    ($facts:ident, $type:ident: $($field:ident)*) => {
        $({
            fn size<T>(_: impl Fn(&$type) -> &T) -> u64 {
                size_of::<T>() as u64
            }
            let name = concat!(stringify!($type), ".", stringify!($field));
            $facts.insert(name.into(), (offset_of!($type, $field) as u64, size(|of| &of.$field)));
        })*
    };
}

macro_rules! constants {
    ($facts:ident: $($name:ident)*) => {
        $($facts.insert(stringify!($name).into(), (flags::$name.into(), 0));)*
    };
}

fn of_rust() -> Facts {
    let mut facts = Facts::new();
    fields! { facts, Params: arguments shape schedule }
    fields! { facts, Arguments:
        x dy out weight bias residual skip gate sum dskip dgate stats sums part_moments part_sums param_parts
        given_mean given_low given_var running_mean running_var dweight dbias
        weight_dtype bias_dtype given_mean_dtype given_var_dtype running_mean_dtype running_var_dtype
        dweight_dtype dbias_dtype
    }
    fields! { facts, Shape:
        outer rows width run span sets sets_per_outer set_len params set_params tokens block_dims block_strides
        eps momentum count weight_offset slope by_span by_sets flags activation
    }
    fields! { facts, Schedule:
        segs seg_len seg_stride chunk_len pieces segs_per_chunk chunks chunk_rows
        part_chunks part_width part_run part_span copies param_width param_span
        by_seg by_chunks by_pieces lanes segment_lanes combine_lanes reduce_columns stages
    }
    fields! { facts, Divisor: divisor magic shift }
    constants! { facts:
        CENTER FIXED PER_SET PER_COLUMN PER_ROW UNWEIGHTED PART_WEIGHTED WANT_PARAMS FUSED BLOCKS SUMS_WRITE PLAIN_NORM
    }
    let activations = [
        ("NONE", None),
        ("RELU", Some(Activation::Relu)),
        ("RELU6", Some(Activation::Relu6)),
        ("LEAKY_RELU", Some(Activation::LeakyRelu(0.1))),
        ("SILU", Some(Activation::Silu)),
        ("SIGMOID", Some(Activation::Sigmoid)),
        ("HARD_SWISH", Some(Activation::HardSwish)),
        ("GELU", Some(Activation::Gelu)),
        ("GELU_TANH", Some(Activation::GeluTanh)),
    ];
    for (name, element) in ELEMENTS {
        let mut of = |what: &str, value: usize| facts.insert(format!("{name} {what}"), (value as u64, 0));
        of("bytes", element.bytes());
        of("backward_elements", held::backward_elements(element));
        of("gradient_step", held::wide(element));
        of("held 1", held::held_bytes(element, 1));
        of("held 1001", held::held_bytes(element, 1001));
        of("apart 101", held::apart(element, 101));
        if element.bytes() == element.accumulator_bytes() {
            of("slots", held::slots(element.bytes()));
        }
    }
    // No cluster adds up f64.
    for (name, bytes) in [("f32", 4), ("f64", 8)] {
        facts.insert(format!("{name} slots of a cluster"), (held::slots(bytes) as u64, 0));
    }
    facts.insert("threads of a group".into(), (held::MAX_BLOCK as u64, 0));
    facts.insert("blocks of a cluster".into(), (held::CLUSTER as u64, 0));
    facts.insert("bytes that a thread keeps".into(), (held::KEPT_BYTES as u64, 0));
    facts.insert("bytes of single elements that a thread keeps".into(), (held::KEPT_SINGLE_BYTES as u64, 0));
    facts.insert("bytes in packs of 16 that a thread keeps".into(), (held::KEPT_BYTES_VECTOR as u64, 0));
    facts
        .insert("bytes in packs of 16 that a thread of a cluster keeps".into(), (held::KEPT_BYTES as u64, 0));
    facts.insert("bytes of a chunk".into(), (split::FORWARD_BYTES as u64, 0));
    facts.extend(activations.map(|(name, of)| (name.into(), (activation_code(of).0.into(), 0))));
    facts
}

#[test]
fn both_sides_state_the_same() {
    let (cuda, rust) = (of_cuda(), of_rust());
    let different: Vec<_> = cuda
        .keys()
        .chain(rust.keys())
        .filter(|name| cuda.get(*name) != rust.get(*name))
        .map(|name| format!("{name}: CUDA {:?}, Rust {:?}", cuda.get(name), rust.get(name)))
        .collect();
    assert!(different.is_empty(), "{different:#?}");
    // No field is left out of both lists: those of a struct follow each other without a gap.
    let structs = [
        ("Params.", size_of::<Params>()),
        ("Arguments.", size_of::<Arguments>()),
        ("Shape.", size_of::<Shape>()),
        ("Schedule.", size_of::<Schedule>()),
        ("Divisor.", size_of::<Divisor>()),
    ];
    for (of, bytes) in structs {
        let mut fields: Vec<_> =
            rust.iter().filter(|(name, _)| name.starts_with(of)).map(|(_, fact)| *fact).collect();
        fields.sort();
        let end = fields.iter().fold(0, |end, &(offset, bytes)| {
            assert_eq!(offset, end, "{of}: bytes that no listed field has");
            offset + bytes
        });
        // A struct may end in padding.
        assert!(bytes as u64 - end < 8, "{of}: {end} of {bytes} bytes have a listed field");
    }
}

#[test]
fn dtype_codes_are_what_kernels_read() {
    for (name, element) in ELEMENTS {
        let name = CString::new(name).expect("a name without zeros");
        // SAFETY: it reads the name.
        let code = unsafe { norm_emulation_code(name.as_ptr()) };
        assert_eq!(code, u64::from(element.code()), "{element:?}");
    }
}

/// Every 16-bit number, and what lies at and around the middle between it and the next, is converted as
/// the crate `half` does.
#[test]
fn sixteen_bit_floats_are_rounded_to_nearest() {
    let same =
        |got: f32, expected: f32| got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan();
    for bits in 0..=u16::MAX {
        // SAFETY: functions of numbers, here and below.
        let (half, brain) = unsafe { (norm_emulation_of_f16(bits), norm_emulation_of_bf16(bits)) };
        assert!(same(half, f16::from_bits(bits).to_f32()), "f16 {bits:#x}");
        assert!(same(brain, bf16::from_bits(bits).to_f32()), "bf16 {bits:#x}");
        // The next number of f16 lies 13 bits up where both are normal, of bf16 16.
        for (v, last) in [(half, 13), (brain, 16)] {
            let middle = v.to_bits() ^ 1 << (last - 1);
            for near in
                [v.to_bits(), middle, middle.wrapping_add(1), middle.wrapping_sub(1)].map(f32::from_bits)
            {
                // SAFETY: as above.
                let (half, brain) = unsafe { (norm_emulation_to_f16(near), norm_emulation_to_bf16(near)) };
                assert!(same(f16::from_bits(half).to_f32(), f16::from_f32(near).to_f32()), "f16 of {near:e}");
                assert!(
                    same(bf16::from_bits(brain).to_f32(), bf16::from_f32(near).to_f32()),
                    "bf16 of {near:e}"
                );
            }
        }
    }
}

/// Every entry of the table is a kernel of the sources, bound as the plan launches it.
#[test]
fn every_entry_registers() -> candle_core::Result<()> {
    for entry in Entry::all() {
        let kernel = find(entry.name())?;
        // SAFETY: a literal of the table of kernels.
        let name = unsafe { CStr::from_ptr(kernel.name) };
        assert_eq!(name.to_str(), Ok(entry.name()));
        let (threads, cluster) = bounds(entry);
        assert_eq!((kernel.threads as usize, kernel.cluster as usize), (threads, cluster), "{name:?}");
        assert!(kernel.blocks >= 1 && !kernel.function.is_null(), "{kernel:?}");
    }
    assert!(find("norm_that_is_not_there").is_err());
    Ok(())
}

/// A launch that a GPU refuses, or that the kernel's bounds rule out, is an error that says so.
#[test]
fn launches_that_do_not_fit_fail() -> candle_core::Result<()> {
    let entry = |name: &str| Entry::all().find(|entry| entry.name() == name).expect("an entry");
    let fits =
        |capability, launch: Launch| Emulated::new(capability)?.check(&launch, find(launch.entry.name())?);
    let plain =
        Launch { entry: entry("norm_combine_moments_f32"), grid: 2, block: 128, shared: 0, cluster: 1 };
    let cluster =
        Launch { entry: entry("norm_forward_cluster_f32"), grid: 16, block: 256, shared: 768, cluster: 8 };
    let held =
        Launch { entry: entry("norm_forward_held_f32"), grid: 1, block: 256, shared: 90 << 10, cluster: 1 };
    for (capability, launch) in [(70, plain), (90, cluster), (70, held)] {
        fits(capability, launch)?;
    }
    for (capability, launch, words) in [
        (80, Launch { block: 0, ..plain }, "0 threads"),
        (80, Launch { block: 100, ..plain }, "100 threads"),
        (90, Launch { block: 288, ..cluster }, "288 threads, expected warps of at most 256"),
        (90, Launch { cluster: 2, ..cluster }, "clusters of 2, expected clusters of 8"),
        (90, Launch { grid: 12, ..cluster }, "12 blocks in clusters"),
        (80, Launch { grid: 0, ..plain }, "0 blocks"),
        (80, Launch { shared: 49 << 10, ..plain }, "expected at most 49152"),
        (70, Launch { shared: 97 << 10, ..held }, "expected at most 98304"),
        (80, cluster, "capability 80, expected 90"),
    ] {
        let said = fits(capability, launch).map_err(|error| error.to_string());
        assert!(
            said.as_ref().is_err_and(|said| said.contains(words)),
            "{launch:?}: {said:?}, expected {words}"
        );
    }
    // The check stands before the launch itself.
    let machine = Emulated::new(80)?;
    assert!(machine.launch(&Launch { block: 0, ..plain }, &Params::default(), false).is_err());
    Ok(())
}
