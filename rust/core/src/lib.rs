//! Stream the difference of two checkpoints, tensor by tensor, without loading a model.
//!
//! Data flows one way: [`Checkpoint`] → [`align()`](align::align) → [`stream`] or [`merge`] →
//! [`Writer`]. This crate knows bytes, names, shapes and dtypes; it knows neither torch nor Python.

pub mod align;
pub mod checkpoint;
pub mod dtype;
pub mod error;
pub mod in_memory;
pub mod interrupt;
pub mod json;
pub mod kernel;
pub mod merge;
pub mod output;
mod platform;
pub mod stream;
mod workers;

pub use checkpoint::{Checkpoint, Reader};
pub use dtype::Dtype;
pub use error::{Error, Result};
pub use kernel::Moments;
pub use output::{Storage, Writer};
