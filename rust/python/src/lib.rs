//! `drift_fast._core`: convert, detach the interpreter, call the core, convert back.
//!
//! Nothing is decided here. Each verb has a file; only [`buffers`] has unsafe code.

mod align;
mod buffers;
mod checkpoint;
mod convert;
mod detach;
mod errors;
mod in_memory;
mod json;
mod merge;
mod stored;
mod stream;
mod writers;

use pyo3::prelude::*;

/// The version of what this module takes and returns, and what it means. Raise it with every change,
/// here and in `python/drift_fast/__init__.py`, which refuses to be imported beside another number.
const INTERFACE: u32 = 3;

/// The compiled half of drift_fast.
#[pymodule(gil_used = false)]
mod _core {
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::align::{Aligned, align, correlate_samples};
    #[pymodule_export]
    use super::checkpoint::Checkpoint;
    #[pymodule_export]
    use super::errors::{
        AlignmentError, AmbiguousAlignmentError, CheckpointError, CoverageError, DriftError,
        NonFiniteError,
    };
    #[pymodule_export]
    use super::in_memory::{dots, measure, subtract_scaled};
    #[pymodule_export]
    use super::json::json_memory;
    #[pymodule_export]
    use super::merge::merge;
    #[pymodule_export]
    use super::stored::StoredDelta;
    #[pymodule_export]
    use super::stream::{load_differences, stream};
    #[pymodule_export]
    use super::writers::{
        DeltaWriter, ModelWriter, is_side_file, output_paths, shards, side_file_names,
    };

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("interface", super::INTERFACE)?;
        // Timings of an unoptimized build mean nothing; the benchmarks refuse one.
        module.add("debug_build", cfg!(debug_assertions))
    }
}
