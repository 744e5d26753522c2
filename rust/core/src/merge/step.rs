//! The arithmetic of a chunk: blocks of every model's values, task vectors, and each method's result.

use std::ops::Range;

use super::job::{Blend, Found, Method, limit};
use crate::dtype::Dtype;
use crate::kernel::Elements;
use crate::kernel::blend::{self, BLOCK, Values};

/// Values of one block of every model, widened to float64.
pub(super) struct Widened {
    pub(super) m: Values,
    pub(super) r: Values,
    pub(super) b: Values,
    /// The task vectors.
    pub(super) tasks: [Values; 2],
    pub(super) out: Values,
}

/// The elements of a chunk in every model.
pub(super) struct Sides<'a> {
    pub(super) m: Elements<'a>,
    pub(super) r: Elements<'a>,
    pub(super) b: Option<Elements<'a>>,
    /// Whether r has yet to be added to m.
    pub(super) is_delta: bool,
    /// The number of the first element.
    pub(super) start: usize,
}

impl Sides<'_> {
    /// Load the elements that every model stores, block by block; `then` gets the number of the first
    /// element and their count.
    pub(super) fn each(
        &self,
        present: &[Range<usize>],
        values: &mut Widened,
        mut then: impl FnMut(&mut Widened, usize, usize),
    ) {
        for run in present {
            for element in run.clone().step_by(BLOCK) {
                let len = BLOCK.min(run.end - element);
                let (start, end) = (element - self.start, element - self.start + len);
                blend::widen(self.m.slice(start, end), &mut values.m[..len]);
                blend::widen(self.r.slice(start, end), &mut values.r[..len]);
                if self.is_delta {
                    blend::completed(&values.m[..len], &mut values.r[..len]);
                }
                if let Some(b) = &self.b {
                    blend::widen(b.slice(start, end), &mut values.b[..len]);
                }
                then(values, element, len);
            }
        }
    }

    /// Σr², Σm², Σrm, block by block, without values that are not finite.
    pub(super) fn products(&self, present: &[Range<usize>], values: &mut Widened) -> [f64; 3] {
        let mut sums = [0.0; 3];
        self.each(present, values, |Widened { m, r, .. }, _, len| {
            let (m, r) = (&mut m[..len], &mut r[..len]);
            if blend::nonfinite(m) + blend::nonfinite(r) > 0 {
                for (m, r) in m.iter_mut().zip(r.iter_mut()) {
                    if !m.is_finite() || !r.is_finite() {
                        (*m, *r) = (0.0, 0.0);
                    }
                }
            }
            for (sum, product) in sums.iter_mut().zip(blend::products(r, m)) {
                *sum += product;
            }
        });
        sums
    }
}

impl Widened {
    /// Compute a task vector: 0 is the reasoning model's, 1 the multimodal model's.
    pub(super) fn task(&mut self, task: usize, len: usize, has_base: bool) {
        let from = if has_base { &self.b } else { &self.m };
        let of = if task == 0 { &self.r } else { &self.m };
        blend::difference(&of[..len], &from[..len], &mut self.tasks[task][..len]);
    }

    /// Write the values that the multimodal model keeps in the result's dtype, and return how many
    /// finite ones are beyond its range.
    pub(super) fn stay(&mut self, m: Elements<'_>, bytes: &mut [u8], dtype: Dtype) -> u64 {
        let values = &mut self.m[..bytes.len() / dtype.nbytes()];
        blend::widen(m, values);
        blend::round(values, dtype, bytes);
        if blend::largest(values) <= dtype.max_finite() {
            return 0;
        }
        let written = Elements { dtype, bytes };
        let lost = |(i, value): &(usize, &f64)| value.is_finite() && !written.value(*i).is_finite();
        values.iter().enumerate().filter(lost).count() as u64
    }

    /// Σ of the squares of the shift from the multimodal model to the results, and of what rounding
    /// them to `written` added. The task vectors are lost.
    fn rounding(&mut self, len: usize, written: Elements<'_>) -> [f64; 2] {
        let Self { m, out, b, tasks: [shift, added], .. } = self;
        let (shift, added, rounded) = (&mut shift[..len], &mut added[..len], &mut b[..len]);
        blend::difference(&out[..len], &m[..len], shift);
        blend::widen(written, rounded);
        blend::difference(rounded, &out[..len], added);
        let [shift_sq, rounding_sq, _] = blend::products(shift, added);
        [shift_sq, rounding_sq]
    }

    /// Count the results that are not finite although all their inputs are.
    pub(super) fn overflow(&self, len: usize, has_base: bool, written: Elements<'_>) -> u64 {
        (0..len)
            .filter(|&i| {
                let base = !has_base || self.b[i].is_finite();
                let sources = self.m[i].is_finite() && self.r[i].is_finite() && base;
                sources && !written.value(i).is_finite()
            })
            .count() as u64
    }
}

/// One block of so many shows how much of a merge its output's dtype loses.
const MEASURED: usize = 8;

/// How the blocks of a tensor are merged.
pub(super) struct Step<'a, 'b> {
    pub(super) method: Method,
    pub(super) blend: &'b Blend<'a>,
    pub(super) thresholds: [f64; 2],
    pub(super) factors: [f64; 2],
    pub(super) keys: [u64; 2],
}

impl Step<'_, '_> {
    pub(super) fn block(
        &self,
        values: &mut Widened,
        element: usize,
        len: usize,
        has_base: bool,
        bytes: &mut [u8],
        dtype: Dtype,
    ) -> Found {
        let (w, v) = (self.blend.weight, self.blend.multimodal_weight);
        let mut found = Found {
            nonfinite_reasoning: blend::nonfinite(&values.r[..len]),
            nonfinite_multimodal: blend::nonfinite(&values.m[..len]),
            nonfinite_base: if has_base { blend::nonfinite(&values.b[..len]) } else { 0 },
            ..Found::default()
        };
        match self.method {
            Method::Take => values.out[..len].copy_from_slice(&values.r[..len]),
            Method::Linear => {
                let Widened { m, r, out, .. } = values;
                blend::weighted(1.0 - w, &m[..len], w, &r[..len], &mut out[..len]);
            }
            Method::Slerp => {
                let Widened { m, r, out, .. } = values;
                let [of_m, of_r] = self.factors;
                blend::weighted(of_m, &m[..len], of_r, &r[..len], &mut out[..len]);
            }
            Method::TaskArithmetic if !has_base || v == 1.0 => {
                values.task(0, len, has_base);
                let Widened { m, tasks, out, .. } = values;
                blend::moved(&m[..len], w, &tasks[0][..len], &mut out[..len]);
            }
            Method::TaskArithmetic => {
                values.task(0, len, true);
                values.task(1, len, true);
                let Widened { b, tasks: [r, m], out, .. } = values;
                blend::added(&b[..len], w, &r[..len], v, &m[..len], &mut out[..len]);
            }
            Method::Ties { .. } | Method::DareLinear { .. } | Method::DareTies { .. } => {
                let kept = self.thinned(values, element, len, has_base);
                [found.kept_reasoning, found.kept_multimodal] = kept;
            }
        }
        let out = &values.out[..len];
        blend::round(out, dtype, bytes);
        let inputs = found.nonfinite_reasoning + found.nonfinite_multimodal + found.nonfinite_base;
        let largest = blend::largest(out);
        if inputs > 0 || largest.is_nan() || largest > dtype.max_finite() {
            found.overflow = values.overflow(len, has_base, Elements { dtype, bytes });
        } else if (element / BLOCK).is_multiple_of(MEASURED) {
            [found.shift_sq, found.rounding_sq] = values.rounding(len, Elements { dtype, bytes });
        }
        found
    }

    /// Merge by task vectors that are thinned first, and return how many elements of each are kept.
    fn thinned(
        &self,
        values: &mut Widened,
        element: usize,
        len: usize,
        has_base: bool,
    ) -> [Option<u64>; 2] {
        let mut kept = [None; 2];
        for (task, kept) in kept.iter_mut().enumerate().take(1 + usize::from(has_base)) {
            values.task(task, len, has_base);
            *kept = Some(self.thin(task, &mut values.tasks[task][..len], element));
        }
        let (w, v) = (self.blend.weight, self.blend.multimodal_weight);
        let Widened { m, b, tasks: [first, second], out, .. } = values;
        let (first, second, out) = (&first[..len], &second[..len], &mut out[..len]);
        match (has_base, self.method) {
            (false, _) => blend::moved(&m[..len], w, first, out),
            (true, Method::DareLinear { .. }) => blend::added(&b[..len], w, first, v, second, out),
            (true, _) => blend::elected(&b[..len], w, first, v, second, out),
        }
        kept
    }

    /// Trim a task vector, or drop and rescale, and return how many elements are kept.
    fn thin(&self, task: usize, vector: &mut [f64], element: usize) -> u64 {
        match self.method {
            Method::DareLinear { density, .. } | Method::DareTies { density, .. } => {
                blend::drop_out(vector, self.keys[task], element as u64, limit(density), density)
            }
            _ => blend::trim(vector, self.thresholds[task]),
        }
    }
}
