//! Converts values between flax's shapes and ours. Every conversion moves values and computes none.

use std::borrow::Cow;

use super::tensor::{Tensor, transpose};
use crate::vit::names::Form;

impl Form {
    /// The values of our part, from values of flax's `shape`.
    pub(super) fn own_values<'a>(self, values: Cow<'a, [f32]>, shape: &[usize]) -> Cow<'a, [f32]> {
        let product = |dims: &[usize]| dims.iter().product::<usize>();
        match self {
            Form::Same | Form::Rows { .. } | Form::HeadsBias { .. } | Form::Leading { .. } => values,
            Form::Slice { first, count, of } => {
                let part = values.len() / of;
                let range = first * part..(first + count) * part;
                match values {
                    Cow::Borrowed(all) => Cow::Borrowed(&all[range]),
                    Cow::Owned(all) => all[range].to_vec().into(),
                }
            }
            // [ph, pw, 3, D]: a transpose gives [D, ph, pw, 3], then the channel moves before the pixels.
            Form::Patch => {
                let (d, channels) = (shape[3], shape[2]);
                let rows = transpose(&values, values.len() / d.max(1), d);
                let kernels = rows.chunks(product(&shape[..3]).max(1));
                kernels.flat_map(|k| transpose(k, k.len() / channels, channels)).collect()
            }
            Form::Dense | Form::Heads { .. } => transpose(&values, shape[0], product(&shape[1..])).into(),
            Form::HeadsOut => transpose(&values, shape[0] * shape[1], shape[2]).into(),
        }
    }

    /// Our part (values, and the shape of the part) → flax; the inverse of [`Form::own_values`].
    pub(super) fn to_flax(self, values: &[f32], own: &[usize], heads: usize) -> Tensor {
        let head_size = |width: usize| width / heads;
        match (self, own) {
            (Form::Dense, &[o, i]) => Tensor::new([i, o], transpose(values, o, i)),
            (Form::Patch, &[d, c, h, w]) => {
                let pixels_first: Vec<f32> =
                    values.chunks(c * h * w).flat_map(|k| transpose(k, c, h * w)).collect();
                Tensor::new([h, w, c, d], transpose(&pixels_first, d, h * w * c))
            }
            (Form::Heads { .. }, &[rows, d]) => {
                Tensor::new([d, heads, head_size(rows)], transpose(values, rows, d))
            }
            (Form::HeadsBias { .. }, &[rows]) => Tensor::new([heads, head_size(rows)], values.to_vec()),
            (Form::HeadsOut, &[d, cols]) => {
                Tensor::new([heads, head_size(cols), d], transpose(values, d, cols))
            }
            (Form::Same | Form::Rows { .. }, shape) => Tensor::new(shape, values.to_vec()),
            (form, shape) => panic!("{form:?} of shape {shape:?}"),
        }
    }
}
