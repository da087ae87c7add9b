//! The geometry against the norms' definitions in logical indices, over every memory order.

use super::*;
use std::collections::HashMap;

/// Strides of `dims` when laid out densely with `order` from the outermost to the innermost.
fn strides(dims: &[usize], order: &[usize]) -> Vec<usize> {
    let mut stride = vec![0; dims.len()];
    let mut next = 1;
    for &d in order.iter().rev() {
        stride[d] = next;
        next *= dims[d];
    }
    stride
}

fn permutations(n: usize) -> Vec<Vec<usize>> {
    if n == 0 {
        return vec![vec![]];
    }
    let insert = |p: Vec<usize>| {
        (0..n).map(move |at| {
            let mut p = p.clone();
            p.insert(at, n - 1);
            p
        })
    };
    permutations(n - 1).into_iter().flat_map(insert).collect()
}

fn logical_indices(dims: &[usize]) -> Vec<Vec<usize>> {
    dims.iter().fold(vec![vec![]], |all, &dim| {
        all.into_iter()
            .flat_map(|index: Vec<usize>| (0..dim).map(move |i| [index.clone(), vec![i]].concat()))
            .collect()
    })
}

/// Holds `placed` against the set and the parameter that the norm's definition gives each element.
fn check(
    dims: &[usize],
    stride: &[usize],
    placed: &Placed,
    set: impl Fn(&[usize]) -> Vec<usize>,
    param: impl Fn(&[usize]) -> usize,
) {
    let g = placed.geometry;
    assert_eq!(g.elements(), dims.iter().product::<usize>(), "{dims:?} {stride:?}");
    let (mut forth, mut back) = (HashMap::new(), HashMap::new());
    for index in logical_indices(dims) {
        let at: usize = index.iter().zip(stride).map(|(i, s)| i * s).sum();
        let (outer, row, column) = (at / g.block_len(), at / g.width % g.rows, at % g.width);
        let ours = outer * g.sets_per_outer() + column / g.run;
        let theirs = set(&index);
        assert!(ours < g.sets());
        assert_eq!(forth.entry(theirs.clone()).or_insert(ours), &ours, "{dims:?} {stride:?} {g:?}");
        assert_eq!(back.entry(ours).or_insert(theirs.clone()), &theirs, "{dims:?} {stride:?} {g:?}");
        assert_eq!(g.param(row, column), param(&index), "{dims:?} {stride:?} {g:?} at {index:?}");
    }
    let order = placed.order.clone().unwrap_or((0..dims.len()).collect());
    let permuted: Vec<usize> = order.iter().map(|&d| dims[d]).collect();
    let expected = strides(&permuted, &(0..dims.len()).collect::<Vec<_>>());
    for (&d, expected) in order.iter().zip(expected) {
        assert!(dims[d] == 1 || stride[d] == expected, "order {order:?} of {dims:?} {stride:?}");
    }
}

/// Shapes with a 1 in every place, and one of distinct primes.
const SHAPES: [&[usize]; 9] = [
    &[2, 6],
    &[1, 6],
    &[3, 4, 5],
    &[3, 4, 1],
    &[1, 4, 5],
    &[2, 4, 3, 5],
    &[2, 4, 1, 5],
    &[2, 1, 3, 5],
    &[2, 4, 3, 1],
];

#[test]
fn channel_norms_in_every_memory_order() {
    let (mut placed, mut refused) = (0, 0);
    for dims in SHAPES {
        for order in permutations(dims.len()) {
            let stride = strides(dims, &order);
            for groups in [0, 1, 2, dims[1]] {
                if groups > 0 && dims[1] % groups != 0 {
                    continue;
                }
                let sets = if groups == 0 { Channels::Batch } else { Channels::Groups(groups) };
                let Some(place) = channels(dims, &stride, sets) else {
                    refused += 1;
                    continue;
                };
                placed += 1;
                let set = |i: &[usize]| match groups {
                    0 => vec![i[1]],
                    g => vec![i[0], i[1] / (dims[1] / g)],
                };
                check(dims, &stride, &place, set, |i| i[1]);
            }
        }
    }
    // Orders that interleave N, C and S are refused, to be copied.
    assert!(placed > 0 && refused > 0, "{placed} placed, {refused} refused");
}

#[test]
fn layer_norms_in_every_memory_order() {
    for dims in SHAPES {
        for order in permutations(dims.len()) {
            let stride = strides(dims, &order);
            for normalized in 1..=dims.len() {
                let lead = dims.len() - normalized;
                let Some(place) = layer(dims, &stride, normalized, true) else { continue };
                let flat = |i: &[usize]| i[lead..].iter().zip(&dims[lead..]).fold(0, |at, (i, d)| at * d + i);
                check(dims, &stride, &place, |i| i[..lead].to_vec(), flat);
            }
        }
    }
}

#[test]
fn the_layouts_models_use_are_never_copied() {
    let nchw = [2, 4, 3, 5];
    let last = strides(&nchw, &[0, 2, 3, 1]);
    for sets in [Channels::Batch, Channels::Groups(2), Channels::Groups(4)] {
        assert!(channels(&nchw, &strides(&nchw, &[0, 1, 2, 3]), sets).unwrap().order.is_none());
        assert_eq!(channels(&nchw, &last, sets).unwrap().order, Some(vec![0, 2, 3, 1]));
    }
    // Layer norm over the channels of an NCHW tensor seen as NHWC (ConvNeXt).
    let nhwc = [2, 3, 5, 4];
    let place = layer(&nhwc, &strides(&nhwc, &[0, 3, 1, 2]), 1, true).unwrap();
    assert_eq!((place.geometry.outer, place.geometry.rows, place.geometry.width), (2, 4, 15));
}

#[test]
fn narrowed_and_broadcast_strides_are_refused() {
    assert!(channels(&[2, 3], &[4, 1], Channels::Batch).is_none());
    assert!(layer(&[2, 3], &[0, 1], 1, true).is_none());
    assert!(layer(&[2, 3], &[6, 2], 1, true).is_none());
}

#[test]
fn empty_inputs_have_a_geometry() {
    for dims in [[0, 3, 4], [2, 0, 4], [2, 3, 0]] {
        let stride = strides(&dims, &[0, 1, 2]);
        for sets in [Channels::Batch, Channels::Groups(1)] {
            assert_eq!(channels(&dims, &stride, sets).unwrap().geometry.elements(), 0);
        }
        assert_eq!(layer(&dims, &stride, 2, true).unwrap().geometry.elements(), 0);
    }
}

/// Every block starts where its strides say, for views of up to four leading dimensions.
#[test]
fn blocks_lie_where_the_strides_say() {
    let inner = [(vec![4], vec![1]), (vec![2, 3], vec![3, 1])];
    let leads: [(&[usize], &[usize], usize); 8] = [
        (&[], &[], 0),
        (&[3], &[9], 1),
        (&[3, 2], &[20, 10], 1),
        (&[3, 2], &[10, 40], 2),
        (&[2, 1, 3], &[100, 7, 11], 2),
        (&[2, 2, 3], &[0, 30, 10], 2),
        (&[2, 3, 2, 2], &[7, 100, 31, 1000], 4),
        (&[2, 2, 2, 2, 2], &[3, 50, 7, 1000, 90], 5),
    ];
    for (lead, strides, merged) in leads {
        for (shape, own) in &inner {
            let dims: Vec<usize> = lead.iter().chain(shape).copied().collect();
            let stride: Vec<usize> = strides.iter().chain(own).copied().collect();
            let placed = rows(&dims, &stride, shape.len(), true);
            assert_eq!(placed.is_some(), merged <= 4, "{lead:?} {strides:?}");
            let Some(Placed { geometry, blocks: Some(blocks), order: None }) = placed else { continue };
            assert_eq!(blocks.dims.iter().filter(|&&dim| dim > 1).count(), merged, "{blocks:?}");
            assert_eq!(blocks.dims.iter().product::<usize>(), geometry.outer);
            for block in 0..geometry.outer {
                let index = |dims: &[usize], strides: &[usize]| {
                    let mut rest = block;
                    dims.iter().zip(strides).rev().fold(0, |at, (dim, stride)| {
                        let here = rest % dim;
                        rest /= dim;
                        at + here * stride
                    })
                };
                assert_eq!(index(&blocks.dims, &blocks.strides), index(lead, strides));
            }
        }
    }
    assert!(rows(&[3, 4], &[4, 2], 1, true).is_none(), "normalized dimensions with gaps");
    assert!(rows(&[3, 2, 4], &[8, 1, 2], 2, true).is_none(), "normalized dimensions out of order");
}
