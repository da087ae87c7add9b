//! Numbers, truth values and shapes as PyTorch prints them.
//!
//! Apart, so that each layer's `Display` is one line that looks like PyTorch's `extra_repr`.

use candle_nn::Activation;
use std::fmt;

/// A float as Python's `repr`: the shortest digits that read back, `1e-05` below 1e-4.
pub(super) struct Float(pub f64);

impl fmt::Display for Float {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scientific = format!("{:e}", self.0);
        match scientific.split_once('e').and_then(|(digits, e)| Some((digits, e.parse::<i32>().ok()?))) {
            Some((digits, e)) if !(-4..16).contains(&e) => {
                write!(f, "{digits}e{}{:02}", if e < 0 { '-' } else { '+' }, e.abs())
            }
            _ => write!(f, "{:?}", self.0),
        }
    }
}

/// `None`, or the float.
pub(super) struct Maybe(pub Option<f64>);

impl fmt::Display for Maybe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(value) => Float(value).fmt(f),
            None => f.write_str("None"),
        }
    }
}

/// `True` or `False`.
pub(super) fn truth(value: bool) -> &'static str {
    if value {
        "True"
    } else {
        "False"
    }
}

/// The last argument of a layer with a weight and no bias.
pub(super) fn no_bias(affine: bool, bias: bool) -> &'static str {
    if affine && !bias {
        ", bias=False"
    } else {
        ""
    }
}

/// The last argument of a layer with an activation; PyTorch's layers have none.
pub(super) fn activation(activation: Option<Activation>) -> String {
    activation.map_or_else(String::new, |activation| format!(", activation={activation:?}"))
}

/// A shape as a Python tuple: `(64,)`, `(3, 4)`.
pub(super) struct Tuple<'a>(pub &'a [usize]);

impl fmt::Display for Tuple<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [one] => write!(f, "({one},)"),
            dims => {
                let dims: Vec<String> = dims.iter().map(usize::to_string).collect();
                write!(f, "({})", dims.join(", "))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values and strings from CPython 3.11.
    #[test]
    fn floats_as_python_prints_them() {
        let cases = [
            (1e-5, "1e-05"),
            (1e-4, "0.0001"),
            (0.001, "0.001"),
            (1.5e-7, "1.5e-07"),
            (1e-10, "1e-10"),
            (1e-120, "1e-120"),
            (0.0, "0.0"),
            (1.0, "1.0"),
            (123456.789, "123456.789"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
        ];
        for (value, expected) in cases {
            assert_eq!(Float(value).to_string(), expected);
        }
    }
}
