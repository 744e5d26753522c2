//! What is known about one tensor of a batch, from pass to pass.

use std::ops::Range;

use super::job::{Blend, Found, Job, Method};
use super::passes::{length, step};
use super::trim::{Counts, Interval};

/// Beyond this cosine tensors count as parallel: the great circle is a straight line or undefined.
const PARALLEL: f64 = 0.9995;

/// What is known about one tensor of the batch.
#[derive(Default)]
pub(super) struct Known {
    pub(super) found: Found,
    /// The trimming of each task vector that is trimmed.
    pub(super) trims: Vec<Trim>,
    /// Σr², Σm², Σrm of each chunk.
    pub(super) products: Vec<[f64; 3]>,
    pub(super) factors: [f64; 2],
}

pub(super) struct Trim {
    pub(super) density: f64,
    pub(super) interval: Interval,
    pub(super) counts: Counts,
}

/// What was found in a chunk.
pub(super) enum Gave {
    Nothing,
    Sample([Interval; 2]),
    Counts,
    Products([f64; 3]),
    Found(Found),
}

impl Known {
    /// What is known before the first pass.
    pub(super) fn new(job: &Job<'_>, method: Method) -> Self {
        let mut known = Self::default();
        let Some(blend) = &job.blend else { return known };
        let total = length(job);
        let merged: usize = blend.present(&(0..total)).iter().map(Range::len).sum();
        known.found.merged = merged as u64;
        match method {
            Method::Ties { density } if merged > 0 => {
                let vectors = if blend.base.is_some() { 2 } else { 1 };
                known.trims.extend((0..vectors).map(|_| Trim::new(density)));
            }
            Method::Slerp => known.products = vec![[0.0; 3]; total.div_ceil(step(job))],
            _ => {}
        }
        known
    }

    /// Take in what was found in chunk number `index`; `counts` are of both task vectors.
    pub(super) fn add(&mut self, index: usize, gave: Gave, counts: &[Counts; 2]) {
        match gave {
            Gave::Nothing => {}
            Gave::Sample(intervals) => {
                for (trim, interval) in self.trims.iter_mut().zip(intervals) {
                    trim.interval = interval;
                }
            }
            Gave::Counts => {
                for (trim, counts) in self.trims.iter_mut().zip(counts) {
                    if trim.interval.only().is_none() {
                        trim.counts.add(counts);
                    }
                }
            }
            Gave::Products(products) => self.products[index] = products,
            Gave::Found(found) => self.found.add(&found),
        }
    }

    /// Narrow the intervals with the counts of a pass over all values.
    pub(super) fn narrow(&mut self) {
        for trim in &mut self.trims {
            if trim.interval.only().is_none() {
                trim.interval = trim.interval.narrowed(&trim.counts, trim.density);
                trim.counts.clear();
            }
        }
    }

    /// The factors of slerp for both models.
    pub(super) fn conclude(&mut self, blend: &Blend<'_>) {
        let mut sums = [0.0; 3];
        for products in &self.products {
            for (sum, product) in sums.iter_mut().zip(products) {
                *sum += product;
            }
        }
        let [r_sq, m_sq, dot] = sums;
        let w = blend.weight;
        let cosine = dot / (r_sq.sqrt() * m_sq.sqrt());
        self.found.cosine = cosine.is_finite().then_some(cosine);
        self.factors = if cosine.abs() <= PARALLEL {
            let angle = cosine.acos();
            [((1.0 - w) * angle).sin() / angle.sin(), (w * angle).sin() / angle.sin()]
        } else {
            // Also if one of them is zero and the cosine is undefined.
            [1.0 - w, w]
        };
    }
}

impl Trim {
    fn new(density: f64) -> Self {
        Self { density, interval: Interval::ALL, counts: Counts::new() }
    }
}
