//! Rust and CUDA state the same layout, flags and codes.
//!
//! Every field and flag is named on both sides (`cuda/emulation/agree.cpp` has the other one); a field
//! that is in neither list shows as bytes that no field covers.

use crate::cuda::entry::Element;
use crate::cuda::params::{flags, Arguments, Divisor, Params, Schedule, Shape};
use crate::cuda::plan::activation_code;
use crate::fusion::Activation;
use std::collections::BTreeMap;
use std::ffi::{c_char, CStr};
use std::mem::offset_of;

extern "C" {
    fn norm_emulation_fact(n: usize, name: *mut *const c_char, value: *mut u64, bytes: *mut u64) -> bool;
    fn norm_emulation_code(dtype: *const c_char) -> u64;
}

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
        eps momentum count weight_offset slope by_span flags activation unused
    }
    fields! { facts, Schedule:
        segs seg_len seg_stride chunk_len pieces segs_per_chunk chunks chunk_rows
        part_chunks part_width part_run part_span copies param_width param_span
        by_seg lanes segment_lanes combine_lanes reduce_columns stages
    }
    fields! { facts, Divisor: divisor magic shift }
    constants! { facts:
        CENTER FIXED PER_SET PER_COLUMN PER_ROW UNWEIGHTED PART_WEIGHTED WANT_PARAMS FUSED BLOCKS SUMS_WRITE
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
    let dtypes =
        [(c"f32", Element::F32), (c"f16", Element::F16), (c"bf16", Element::BF16), (c"f64", Element::F64)];
    for (name, element) in dtypes {
        // SAFETY: it reads the name.
        let code = unsafe { norm_emulation_code(name.as_ptr()) };
        assert_eq!(code, u64::from(element.code()), "{element:?}");
    }
}
