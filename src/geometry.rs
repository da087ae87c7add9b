//! The one idea: which elements of a tensor form a set, and which weight scales an element.
//!
//! Every norm here normalizes *sets* of elements and scales them by a weight and a bias; the norms
//! differ in nothing else. Seen in its own memory order, a tensor is a contiguous block
//! `[outer, rows, width]`, and
//!
//! * a set is `run` neighbouring columns over all rows of one outer index,
//! * the weight of an element is chosen by its column (`column / span`) or by its row.
//!
//! | norm, memory order | outer | rows | width | run | weight |
//! |---|---|---|---|---|---|
//! | layer, RMS: normalized dims last | leading | 1 | n | n | column, span 1 |
//! | layer, RMS: normalized dims before others | leading | n | trailing | 1 | row |
//! | group, instance (G = C): N C S | N | 1 | C·S | C·S / G | column, span S |
//! | group, instance (G = C): N S C | N | S | C | C / G | column, span 1 |
//! | batch: N C S | 1 | N | C·S | S | column, span S |
//! | batch: N S C | 1 | N·S | C | 1 | column, span 1 |
//!
//! Kernels, launch plans and oracles take a `Geometry` and nothing else about shape.

/// How an element finds its weight and bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightBy {
    /// Element in column `w` uses parameter `w / span`.
    Column {
        /// Neighbouring columns that share a parameter.
        span: usize,
    },
    /// Element in row `r` uses parameter `r`.
    Row,
}

/// A tensor as a contiguous block `[outer, rows, width]`, cut into sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Geometry {
    /// Independent blocks.
    pub outer: usize,
    /// Rows of a block; a set spans all of them.
    pub rows: usize,
    /// Contiguous elements of a row.
    pub width: usize,
    /// Neighbouring columns in one set; divides `width`.
    pub run: usize,
    /// Which parameter scales an element.
    pub weight_by: WeightBy,
    /// Whether the mean is subtracted (false for RMS norm).
    pub center: bool,
}

impl Geometry {
    /// Sets in the tensor; set `s` is block `s / sets_per_outer()`, columns
    /// `(s % sets_per_outer()) * run ..` of it.
    pub fn sets(&self) -> usize {
        self.outer * self.sets_per_outer()
    }

    /// Sets side by side in one block.
    pub fn sets_per_outer(&self) -> usize {
        self.width.checked_div(self.run).unwrap_or(0)
    }

    /// Where the first element of a set lies.
    pub fn first(&self, set: usize) -> usize {
        let spo = self.sets_per_outer();
        set / spo * self.block_len() + set % spo * self.run
    }

    /// Elements in a set.
    pub fn set_len(&self) -> usize {
        self.rows * self.run
    }

    /// Elements in a block.
    pub fn block_len(&self) -> usize {
        self.rows * self.width
    }

    /// Elements in the tensor.
    pub fn elements(&self) -> usize {
        self.outer * self.block_len()
    }

    /// Length of the weight and of the bias.
    pub fn params(&self) -> usize {
        match self.weight_by {
            WeightBy::Column { span } => self.width.checked_div(span).unwrap_or(0),
            WeightBy::Row => self.rows,
        }
    }

    #[cfg(test)]
    /// Parameter of the element in row `row` and column `column` of any block.
    pub fn param(&self, row: usize, column: usize) -> usize {
        match self.weight_by {
            WeightBy::Column { span } => column / span,
            WeightBy::Row => row,
        }
    }

    /// Whether every element of a set has the same weight (batch and instance norm).
    pub fn one_param_per_set(&self) -> bool {
        matches!(self.weight_by, WeightBy::Column { span } if span == self.run)
    }
}

/// The part a dimension plays in a norm, in the order the norm's formula names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Dimensions before the normalized ones, or the batch.
    Lead,
    /// Normalized dimensions of layer and RMS norm, or the channels.
    Main,
    /// Spatial dimensions.
    Space,
}

/// A geometry, and the order of dimensions (outermost first) in which the input is contiguous.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// The block in memory order.
    pub geometry: Geometry,
    /// `input.permute(order)` is contiguous; `None` where the input is already, or lies in blocks.
    pub order: Option<Vec<usize>>,
    /// Where the blocks lie, if not one behind the other.
    pub blocks: Option<Blocks>,
}

/// Where the blocks (`outer`) of an x lie that is not contiguous as a whole, for geometries of one row a
/// block: block `o`, counted through `dims` from the last on, starts at the sum of index times stride.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Blocks {
    /// Outermost first, 1 where there is none; their product is `outer`.
    pub dims: [usize; 4],
    /// In elements.
    pub strides: [usize; 4],
}

impl Blocks {
    /// Leading dimensions as few as their strides allow; `None` where that is more than four.
    fn of(dims: &[usize], stride: &[usize]) -> Option<Blocks> {
        let mut merged: Vec<(usize, usize)> = vec![];
        for (&dim, &stride) in dims.iter().zip(stride).filter(|(&dim, _)| dim != 1) {
            match merged.last_mut() {
                Some((before, outer)) if *outer == dim * stride => {
                    (*before, *outer) = (*before * dim, stride)
                }
                _ => merged.push((dim, stride)),
            }
        }
        let mut blocks = Blocks { dims: [1; 4], strides: [0; 4] };
        let first = blocks.dims.len().checked_sub(merged.len())?;
        for (i, (dim, stride)) in merged.into_iter().enumerate() {
            (blocks.dims[first + i], blocks.strides[first + i]) = (dim, stride);
        }
        Some(blocks)
    }

    /// Where block `o` starts.
    pub fn start(&self, o: usize) -> usize {
        let (mut rest, mut at) = (o, 0);
        for d in (0..4).rev() {
            at += rest % self.dims[d] * self.strides[d];
            rest /= self.dims[d];
        }
        at
    }
}

/// Layer and RMS norm over the last `normalized` dimensions of an input that is contiguous in these alone: rows
/// cut out of larger ones, heads of attention beside each other. The output is contiguous.
pub fn rows(dims: &[usize], stride: &[usize], normalized: usize, center: bool) -> Option<Placed> {
    let lead = dims.len() - normalized;
    let inner = memory_order(&dims[lead..], &stride[lead..])?;
    if dims.contains(&0) || !inner.is_sorted() {
        return None;
    }
    let blocks = Blocks::of(&dims[..lead], &stride[..lead])?;
    Some(Placed { geometry: over_last(dims, lead, center), order: None, blocks: Some(blocks) })
}

/// Sets of the dimensions from `lead` on, which lie one behind the other.
fn over_last(dims: &[usize], lead: usize, center: bool) -> Geometry {
    let (outer, n) = (dims[..lead].iter().product(), dims[lead..].iter().product());
    Geometry { outer, rows: 1, width: n, run: n, weight_by: WeightBy::Column { span: 1 }, center }
}

/// Layer and RMS norm over the last `normalized` dimensions; `None` when the strides are not
/// those of a dense permutation with the normalized dimensions together and in order.
pub fn layer(dims: &[usize], stride: &[usize], normalized: usize, center: bool) -> Option<Placed> {
    let lead = dims.len() - normalized;
    if is_contiguous(dims, stride) {
        return Some(Placed { geometry: over_last(dims, lead, center), order: None, blocks: None });
    }
    let order = memory_order(dims, stride)?;
    let n: usize = dims[lead..].iter().product();
    let main = |d: &usize| *d >= lead && dims[*d] != 1;
    let first = order.iter().position(main).unwrap_or(order.len());
    let last = order.iter().rposition(main).map_or(first, |p| p + 1);
    let together = &order[first..last];
    if together.iter().any(|d| *d < lead && dims[*d] != 1) || !is_sorted(together, dims) {
        return None;
    }
    let before: usize = order[..first].iter().map(|&d| dims[d]).product();
    let after: usize = order[last..].iter().map(|&d| dims[d]).product();
    let geometry = if after == 1 {
        Geometry { outer: before, rows: 1, width: n, run: n, weight_by: WeightBy::Column { span: 1 }, center }
    } else {
        Geometry { outer: before, rows: n, width: after, run: 1, weight_by: WeightBy::Row, center }
    };
    Some(Placed { geometry, order: Some(order), blocks: None })
}

/// Which sets the channels of `[N, C, spatial..]` form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channels {
    /// One set per channel over the batch: batch norm.
    Batch,
    /// Sets of `C / groups` channels of one sample: group norm, and instance norm with `groups` = C.
    Groups(usize),
}

/// Batch, group and instance norm over `[N, C, spatial..]`; `None` when the memory order is neither
/// N C S nor N S C.
pub fn channels(dims: &[usize], stride: &[usize], channels: Channels) -> Option<Placed> {
    let (order, last) = match is_contiguous(dims, stride) {
        true => (None, false),
        false => {
            let order = memory_order(dims, stride)?;
            let last = channels_last(&order, dims)?;
            (Some(order), last)
        }
    };
    let (n, c) = (dims[0], dims[1]);
    let s: usize = dims[2..].iter().product();
    let span = if last { 1 } else { s };
    let (outer, rows, width, run) = match (channels, last) {
        (Channels::Batch, false) => (1, n, c * s, s),
        (Channels::Batch, true) => (1, n * s, c, 1),
        (Channels::Groups(g), false) => (n, 1, c * s, c.checked_div(g).unwrap_or(0) * s),
        (Channels::Groups(g), true) => (n, s, c, c.checked_div(g).unwrap_or(0)),
    };
    let geometry = Geometry { outer, rows, width, run, weight_by: WeightBy::Column { span }, center: true };
    Some(Placed { geometry, order, blocks: None })
}

/// Whether the channels lie behind the spatial dimensions; `None` in another order than these two.
fn channels_last(order: &[usize], dims: &[usize]) -> Option<bool> {
    use Role::{Lead, Main, Space};
    let role = |d: usize| match d {
        0 => Lead,
        1 => Main,
        _ => Space,
    };
    let mut roles: Vec<Role> = order.iter().filter(|&&d| dims[d] != 1).map(|&d| role(d)).collect();
    roles.dedup();
    match roles[..] {
        []
        | [Lead]
        | [Main]
        | [Space]
        | [Lead, Main]
        | [Lead, Space]
        | [Main, Space]
        | [Lead, Main, Space] => Some(false),
        [Space, Main] | [Lead, Space, Main] => Some(true),
        _ => None,
    }
}

/// Dimensions sorted from the outermost in memory to the innermost, if they tile it densely.
fn memory_order(dims: &[usize], stride: &[usize]) -> Option<Vec<usize>> {
    let mut order: Vec<usize> = (0..dims.len()).collect();
    if dims.contains(&0) {
        return Some(order);
    }
    // Dimensions of size 1 have arbitrary strides and move nothing: they go where they stand.
    let place = |d: usize| if dims[d] == 1 { (0, d) } else { (1, usize::MAX - stride[d]) };
    // By insertion: there are few, and the library's sort is compiled again for each key.
    for end in 1..order.len() {
        for i in (1..=end).rev() {
            if place(order[i - 1]) > place(order[i]) {
                order.swap(i - 1, i);
            }
        }
    }
    let mut expected = 1;
    for &d in order.iter().rev().filter(|&&d| dims[d] != 1) {
        if stride[d] != expected {
            return None;
        }
        expected *= dims[d];
    }
    Some(order)
}

fn is_sorted(order: &[usize], dims: &[usize]) -> bool {
    let real: Vec<usize> = order.iter().copied().filter(|&d| dims[d] != 1).collect();
    real.windows(2).all(|w| w[0] < w[1])
}

/// As it stands; what holds nothing is.
fn is_contiguous(dims: &[usize], stride: &[usize]) -> bool {
    let mut expected = 1;
    dims.contains(&0)
        || dims.iter().zip(stride).rev().all(|(&dim, &stride)| {
            let fits = dim == 1 || stride == expected;
            expected *= dim;
            fits
        })
}

#[cfg(test)]
mod tests;
