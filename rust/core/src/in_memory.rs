//! Tensors in memory: sums over gradients or weights and Δ, and gradients minus c·Δ.
//!
//! The kernel is that of the stream, so a CPU gradient's norm is as accurate as the delta's own.
//! torch's float32 norm is off by some ten-thousandths for large tensors on a CPU.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::kernel::{Elements, dot, products, subtract_scaled};
use crate::stream::CHUNK;

/// Below this many elements a second thread costs more than it saves.
const WORTH_A_THREAD: usize = 1 << 16;

/// Two tensors with as many elements.
type Sides<'a> = (Elements<'a>, Elements<'a>);

/// Σx², Σy² and Σxy of each pair, accurate to a millionth and at the speed of memory, on up to
/// `threads` threads, whose number does not change them; NaN where an element is not finite.
///
/// # Errors
/// A pair of tensors with different numbers of elements.
pub fn measure(pairs: &[Sides<'_>], threads: usize) -> Result<Vec<[f64; 3]>> {
    let add = |sums: &mut [f64; 3], later: &[f64; 3]| {
        sums.iter_mut().zip(later).for_each(|(sum, later)| *sum += later);
    };
    sums(pairs, threads, |(first, second)| products(first, second), add)
}

/// Σ of the products of each pair in float64, for sums that are compared with earlier ones; not finite
/// where an element is not. The number of threads does not change them.
///
/// # Errors
/// A pair of tensors with different numbers of elements.
pub fn dots(pairs: &[Sides<'_>], threads: usize) -> Result<Vec<f64>> {
    sums(pairs, threads, |(first, second)| dot(first, second), |sum, later| *sum += later)
}

/// What is found in the chunks of each pair, added up in element order.
fn sums<T: Clone + Default + Send + Sync>(
    pairs: &[Sides<'_>],
    threads: usize,
    find: impl Fn(Sides<'_>) -> T + Sync,
    add: impl Fn(&mut T, &T),
) -> Result<Vec<T>> {
    let mut chunks = Vec::new();
    for (pair, (first, second)) in pairs.iter().enumerate() {
        if first.numel() != second.numel() {
            return Err(Error::Argument(format!(
                "pair {pair} has {} elements on one side and {} on the other",
                first.numel(),
                second.numel()
            )));
        }
        let numel = first.numel();
        chunks
            .extend((0..numel).step_by(CHUNK).map(|start| (pair, start, numel.min(start + CHUNK))));
    }
    let results: Vec<OnceLock<T>> = chunks.iter().map(|_| OnceLock::new()).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(&(pair, start, end)) = chunks.get(index) else { return };
            let (first, second) = &pairs[pair];
            // Each index is handed out once, so the cell is still empty.
            let _ = results[index].set(find((first.slice(start, end), second.slice(start, end))));
        }
    };
    let numel: usize = chunks.iter().map(|(_, start, end)| end - start).sum();
    on_threads(threads.min(chunks.len()), numel, work);
    let mut found = vec![T::default(); pairs.len()];
    for ((pair, _, _), result) in chunks.iter().zip(results) {
        add(&mut found[*pair], &result.into_inner().unwrap_or_default());
    }
    Ok(found)
}

/// A tensor to change in place, and what to subtract.
pub struct Step<'a> {
    /// The type of the tensor's elements.
    pub dtype: Dtype,
    /// Its bytes.
    pub tensor: &'a mut [u8],
    /// Δ, with as many elements.
    pub delta: Elements<'a>,
    /// The coefficient.
    pub c: f64,
}

/// Subtract c·Δ from every tensor in place, on up to `threads` threads.
///
/// # Errors
/// A tensor and a Δ with different numbers of elements; nothing is changed then.
pub fn subtract_all(steps: Vec<Step<'_>>, threads: usize) -> Result<()> {
    let mut pieces = Vec::new();
    let mut total = 0;
    for (index, step) in steps.into_iter().enumerate() {
        let (nbytes, numel) = (step.dtype.nbytes(), step.delta.numel());
        if step.tensor.len() != numel * nbytes {
            return Err(Error::Argument(format!(
                "tensor {index} has {} bytes, expected {} for {numel} elements of {}",
                step.tensor.len(),
                numel * nbytes,
                step.dtype.name()
            )));
        }
        total += numel;
        for (part, tensor) in step.tensor.chunks_mut(CHUNK * nbytes).enumerate() {
            let start = part * CHUNK;
            let delta = step.delta.slice(start, numel.min(start + CHUNK));
            pieces.push(Step { dtype: step.dtype, tensor, delta, c: step.c });
        }
    }
    let count = pieces.len();
    let queue = Mutex::new(pieces.into_iter());
    on_threads(threads.min(count), total, || {
        loop {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(piece) = next else { return };
            subtract_scaled(piece.dtype, piece.tensor, piece.delta, piece.c);
        }
    });
    Ok(())
}

/// Run `work` on this thread and, if there is enough to do, on others.
fn on_threads(threads: usize, numel: usize, work: impl Fn() + Sync) {
    thread::scope(|scope| {
        for _ in 1..threads.min(numel / WORTH_A_THREAD) {
            // If the system allows no more threads, the existing ones do all the work.
            if thread::Builder::new().spawn_scoped(scope, &work).is_err() {
                break;
            }
        }
        work();
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn a_multiple_is_subtracted_from_every_element_on_any_number_of_threads() {
        let numel = 2 * CHUNK + 5;
        let delta: Vec<f32> = (0..numel).map(|i| (i % 97) as f32 - 48.0).collect();
        let delta = bytes(&delta);
        for threads in [1, 3] {
            let mut tensor = bytes(&vec![1.0; numel]);
            let elements = Elements::new(Dtype::F32, &delta).unwrap();
            let step = Step { dtype: Dtype::F32, tensor: &mut tensor, delta: elements, c: 0.5 };
            subtract_all(vec![step], threads).unwrap();
            for (i, value) in tensor.as_chunks::<4>().0.iter().enumerate() {
                assert_eq!(f32::from_le_bytes(*value), 1.0 - 0.5 * ((i % 97) as f32 - 48.0));
            }
        }
    }

    #[test]
    fn every_mix_of_dtypes_agrees_with_float64() {
        let dtypes = [Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::F64];
        let encode = |dtype: Dtype, value: f32| match dtype {
            Dtype::BF16 => half::bf16::from_f32(value).to_le_bytes().to_vec(),
            Dtype::F16 => half::f16::from_f32(value).to_le_bytes().to_vec(),
            Dtype::F32 => value.to_le_bytes().to_vec(),
            Dtype::F64 => f64::from(value).to_le_bytes().to_vec(),
        };
        for tensor_dtype in dtypes {
            for delta_dtype in dtypes {
                // 1.5 − 0.25 · 0.75, exact in every type but bfloat16's last bits.
                let mut tensor = encode(tensor_dtype, 1.5);
                let delta = encode(delta_dtype, 0.75);
                let elements = Elements::new(delta_dtype, &delta).unwrap();
                let step =
                    Step { dtype: tensor_dtype, tensor: &mut tensor, delta: elements, c: 0.25 };
                subtract_all(vec![step], 1).unwrap();
                assert_eq!(
                    tensor,
                    encode(tensor_dtype, 1.3125),
                    "{tensor_dtype:?} {delta_dtype:?}"
                );
            }
        }
    }

    #[test]
    fn measured_sums_do_not_depend_on_the_threads() {
        let values: Vec<f32> =
            (0..3 * CHUNK).map(|i| ((i * 7) % 101) as f32 / 50.0 - 1.0).collect();
        let bytes = bytes(&values);
        let elements = Elements::new(Dtype::F32, &bytes).unwrap();
        let pairs = [(elements, elements), (elements.slice(3, 1005), elements.slice(0, 1002))];
        let one = measure(&pairs, 1).unwrap();
        assert_eq!(one, measure(&pairs, 5).unwrap());
        let wide = dots(&pairs, 1).unwrap();
        assert_eq!(wide, dots(&pairs, 5).unwrap());
        for (found, start, numel) in [(0, 0, 3 * CHUNK), (1, 3, 1002)] {
            let product = |i| f64::from(values[start + i]) * f64::from(values[i]);
            let products: Vec<f64> = (0..numel).map(product).collect();
            // A sum of a million terms one after the other loses more than the kernel does.
            let exact: f64 = products.chunks(1000).map(|some| some.iter().sum::<f64>()).sum();
            let size: f64 = products.iter().map(|product| product.abs()).sum();
            assert!((one[found][2] - exact).abs() < 1e-6 * size);
            assert!((wide[found] - exact).abs() < 1e-12 * size);
        }
    }
}
