//! How options of a layer are declared: one list makes the fields, their defaults and the setters.
//!
//! Apart from candle-nn's config structs, which programs build as literals and which therefore can
//! never get another field; these are `#[non_exhaustive]` and can.

macro_rules! options {
    (
        $(#[$doc:meta])*
        pub struct $name:ident {
            $( $(#[$field_doc:meta])* $field:ident: $ty:ty = $default:expr, )*
        }
    ) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq)]
        #[non_exhaustive]
        pub struct $name {
            $( $(#[$field_doc])* pub $field: $ty, )*
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $( $field: $default, )* }
            }
        }

        /// The defaults with another `eps`.
        impl From<f64> for $name {
            fn from(eps: f64) -> Self {
                Self::default().eps(eps)
            }
        }

        impl $name {
            $(
                $(#[$field_doc])*
                pub fn $field(mut self, $field: impl Into<$ty>) -> Self {
                    self.$field = $field.into();
                    self
                }
            )*
        }
    };
}

pub(crate) use options;
