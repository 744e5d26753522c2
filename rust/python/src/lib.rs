//! `drift_fast._core`: convert, detach the interpreter, call the core, convert back.
//!
//! Nothing is decided here. The only unsafe code of this crate is [`writable`], the window onto a
//! Python buffer that Rust fills.

mod errors;

use pyo3::prelude::*;

/// The compiled half of drift_fast.
#[pymodule(gil_used = false)]
mod _core {
    use std::ops::ControlFlow;
    use std::path::PathBuf;
    use std::sync::{Mutex, MutexGuard, TryLockError};

    use drift_fast_core::align::compose::{Block, Blocks};
    use drift_fast_core::align::pair::{Pair, Source};
    use drift_fast_core::align::similarity::correlate_samples as correlate;
    use drift_fast_core::align::{Alignment, Named, Ties, align as align_core};
    use drift_fast_core::in_memory::{Precision, Step, measure as measure_core, subtract_all};
    use drift_fast_core::merge::{Blend, Job, Method, run as run_merge};
    use drift_fast_core::output::{
        OutputSpec, RankShare, Slot, Storage, Writer, layout, places_of as output_places,
        side_files,
    };
    use drift_fast_core::stream::{Options, Progress, Sink, decode, run};
    use drift_fast_core::{
        Dtype, Error, Moments, Reader, checkpoint, checkpoint::Operand, checkpoint::block_scales,
        dtype, kernel,
    };
    use pyo3::buffer::PyBuffer;
    use pyo3::exceptions::{PyRuntimeError, PyValueError};
    use pyo3::prelude::*;
    use pyo3::types::{PyDict, PyList};

    use super::errors::to_py;
    #[pymodule_export]
    use super::errors::{
        AlignmentError, AmbiguousAlignmentError, CheckpointError, CoverageError, DriftError,
        NonFiniteError,
    };

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        // Timings of an unoptimised build mean nothing; the benchmarks refuse one.
        module.add("debug_build", cfg!(debug_assertions))
    }

    /// Reasoning name and multimodal name of each match, and a reason for each without one.
    #[pyclass(frozen, get_all, module = "drift_fast._core")]
    struct Aligned {
        prefixes: (String, String),
        pairs: Vec<(String, String)>,
        unmatched_reasoning: Vec<(String, String)>,
        unmatched_multimodal: Vec<(String, String)>,
        layer_conflict: String,
        alternatives: Vec<(String, String, usize)>,
    }

    /// An open checkpoint.
    #[pyclass(frozen, module = "drift_fast._core")]
    struct Checkpoint {
        inner: checkpoint::Checkpoint,
        /// Rows and columns of 8-bit codes that share a scale.
        block: (usize, usize),
    }

    #[pymethods]
    impl Checkpoint {
        #[new]
        #[pyo3(signature = (path, *, reader = "auto", block = None))]
        fn new(
            py: Python<'_>,
            path: PathBuf,
            reader: &str,
            block: Option<(usize, usize)>,
        ) -> PyResult<Self> {
            let reader = match reader {
                "auto" => Reader::Auto,
                "mmap" => Reader::Mmap,
                "pread" => Reader::Pread,
                other => {
                    let message =
                        format!("reader must be 'auto', 'mmap' or 'pread', got {other:?}");
                    return Err(PyValueError::new_err(message));
                }
            };
            let inner = py.detach(|| checkpoint::Checkpoint::open(&path, reader)).map_err(to_py)?;
            Ok(Self { inner, block: block.unwrap_or((128, 128)) })
        }

        /// Each tensor of 8-bit codes, the tensor that holds its block scales or would, and what is
        /// wrong with that one: nothing, unless it is missing or its dtype or shape does not fit.
        fn scales(&self) -> Vec<(String, String, String)> {
            let codes = self
                .inner
                .tensors()
                .filter(|(_, tensor)| dtype::Fp8::from_header(tensor.dtype).is_some());
            codes
                .map(|(_, tensor)| {
                    let fits = self.inner.operand(&tensor.name, self.block);
                    let problem = fits.err().map_or(String::new(), |error| error.to_string());
                    (tensor.name.clone(), block_scales::name_of(&tensor.name), problem)
                })
                .collect()
        }

        /// Fill a buffer with elements [start, stop) of an int8 Δ as bfloat16.
        #[pyo3(signature = (name, buffer, *, elements))]
        fn decode_into(
            &self,
            py: Python<'_>,
            name: &str,
            buffer: &Bound<'_, PyAny>,
            elements: (usize, usize),
        ) -> PyResult<()> {
            let mut buffer = Writable::new(buffer)?;
            py.detach(|| {
                let elements = elements.0..elements.1;
                decode::decode(&self.inner, name, elements, buffer.bytes())
            })
            .map_err(to_py)
        }

        #[getter]
        fn path(&self) -> PathBuf {
            self.inner.path().to_owned()
        }

        fn tensors(&self) -> Vec<(String, String, Vec<usize>, PathBuf)> {
            self.inner
                .tensors()
                .map(|(shard, tensor)| {
                    let dtype = tensor.dtype.to_string();
                    (tensor.name.clone(), dtype, tensor.shape.clone(), shard.path().to_owned())
                })
                .collect()
        }

        /// The file that holds a tensor, and where its bytes begin and end there.
        fn place(&self, name: &str) -> PyResult<(PathBuf, u64, u64)> {
            let (shard, tensor) = self.inner.tensor(name).map_err(to_py)?;
            Ok((shard.path().to_owned(), tensor.range.start, tensor.range.end))
        }

        fn fingerprint(&self, py: Python<'_>) -> PyResult<Vec<(String, u64, String)>> {
            py.detach(|| {
                self.inner
                    .shards()
                    .iter()
                    .map(|shard| {
                        let name = shard.path().file_name().unwrap_or_default();
                        let name = name.to_string_lossy().into_owned();
                        Ok((name, shard.nbytes(), shard.fingerprint()?))
                    })
                    .collect::<drift_fast_core::Result<_>>()
            })
            .map_err(to_py)
        }

        /// Fill a buffer with all of a tensor, or with elements [start, stop) of it.
        #[pyo3(signature = (name, buffer, *, elements = None))]
        fn read_into(
            &self,
            py: Python<'_>,
            name: &str,
            buffer: &Bound<'_, PyAny>,
            elements: Option<(usize, usize)>,
        ) -> PyResult<()> {
            let mut buffer = Writable::new(buffer)?;
            py.detach(|| {
                let (shard, tensor) = self.inner.tensor(name)?;
                let bytes = buffer.bytes();
                let range = match elements {
                    None => tensor.range.clone(),
                    Some((start, stop)) => tensor.elements(start, stop)?.range,
                };
                let expected = (range.end - range.start) as usize;
                if bytes.len() != expected {
                    return Err(Error::Argument(format!(
                        "the buffer for {name} has {} bytes, expected {expected}",
                        bytes.len()
                    )));
                }
                shard.read_exact_at(bytes, range.start)
            })
            .map_err(to_py)
        }
    }

    /// A delta directory being written; it takes its name at `commit`.
    #[pyclass(frozen, module = "drift_fast._core")]
    struct DeltaWriter {
        inner: Mutex<Option<Writer>>,
    }

    #[pymethods]
    impl DeltaWriter {
        #[new]
        #[pyo3(signature = (
            target, tensors, dtype, *, max_shard_nbytes, overwrite, description_nbytes = 0,
            shards = None, join = false
        ))]
        #[expect(clippy::too_many_arguments, reason = "they are the keywords of a Python function")]
        fn new(
            py: Python<'_>,
            target: PathBuf,
            tensors: Vec<(String, Vec<usize>)>,
            dtype: &str,
            max_shard_nbytes: u64,
            overwrite: bool,
            description_nbytes: u64,
            shards: Option<Vec<usize>>,
            join: bool,
        ) -> PyResult<Self> {
            let storage = parse_storage(dtype)?;
            let slots = slots(storage, tensors);
            let spec = OutputSpec {
                target: &target,
                slots: &slots,
                max_shard_nbytes,
                description_nbytes,
                overwrite,
            };
            let share = shards.as_deref().map(|shards| RankShare { shards, join });
            let create = || match share {
                None => Writer::create(&spec, storage),
                Some(share) => Writer::create_share(&spec, storage, share),
            };
            let inner = py.detach(create).map_err(to_py)?;
            Ok(Self { inner: Mutex::new(Some(inner)) })
        }

        /// Write bytes from `offset` of one tensor of the files on, given by its place among those
        /// that this writer writes: in the list, or, as integers, codes at twice that and their
        /// scales after them.
        #[pyo3(signature = (slot, buffer, *, offset = 0))]
        fn write(
            &self,
            py: Python<'_>,
            slot: usize,
            buffer: &Bound<'_, PyAny>,
            offset: usize,
        ) -> PyResult<()> {
            let buffer = Readable::new(buffer)?;
            let guard = self.hold()?;
            let writer = guard.as_ref().ok_or_else(finished)?;
            py.detach(|| writer.write_at(slot, offset, buffer.bytes())).map_err(to_py)
        }

        /// Flush this writer's files to the disk.
        fn flush(&self, py: Python<'_>) -> PyResult<()> {
            let guard = self.hold()?;
            let writer = guard.as_ref().ok_or_else(finished)?;
            py.detach(|| writer.flush()).map_err(to_py)
        }

        /// Flush, add `drift.json` with this text, and give the directory its name.
        fn commit(&self, py: Python<'_>, description: &str) -> PyResult<()> {
            let writer = self.hold()?.take().ok_or_else(finished)?;
            py.detach(|| writer.commit(description)).map_err(to_py)
        }

        /// Remove what was written, unless it was committed.
        fn abort(&self) -> PyResult<()> {
            drop(self.hold()?.take());
            Ok(())
        }
    }

    impl DeltaWriter {
        fn hold(&self) -> PyResult<MutexGuard<'_, Option<Writer>>> {
            hold(&self.inner)
        }
    }

    /// Waiting here could deadlock: whoever holds the writer may be waiting for the interpreter.
    fn hold(writer: &Mutex<Option<Writer>>) -> PyResult<MutexGuard<'_, Option<Writer>>> {
        match writer.try_lock() {
            Ok(guard) => Ok(guard),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => {
                Err(PyRuntimeError::new_err("this output is being written by another call"))
            }
        }
    }

    fn slots(storage: Storage, tensors: Vec<(String, Vec<usize>)>) -> Vec<Slot> {
        tensors.into_iter().flat_map(|(name, shape)| storage.slots(name, shape)).collect()
    }

    /// Names of files that a merge copies, licenses aside.
    #[pyfunction]
    fn side_file_names() -> Vec<&'static str> {
        side_files::NAMES.to_vec()
    }

    /// Whether a merge copies a file of that name.
    #[pyfunction]
    fn is_side_file(name: &str) -> bool {
        side_files::is_side_file(name)
    }

    /// The files that a delta of these tensors has: first tensor, end tensor, bytes.
    #[pyfunction]
    #[pyo3(signature = (tensors, dtype, *, max_shard_nbytes))]
    fn shards(
        tensors: Vec<(String, Vec<usize>)>,
        dtype: &str,
        max_shard_nbytes: u64,
    ) -> PyResult<Vec<(usize, usize, u64)>> {
        let storage = parse_storage(dtype)?;
        let plan = layout::shards(&slots(storage, tensors), storage, max_shard_nbytes);
        let plan = plan.map_err(to_py)?;
        Ok(plan.into_iter().map(|s| (s.tensors.start, s.tensors.end, s.nbytes)).collect())
    }

    /// The absolute path of a delta and the hidden directory that it is written in.
    #[pyfunction]
    fn places_of(target: PathBuf) -> PyResult<(PathBuf, PathBuf)> {
        output_places(&target).map_err(to_py)
    }

    fn finished() -> PyErr {
        PyRuntimeError::new_err("this output was committed or aborted already")
    }

    /// Match two lists of (name, shape).
    #[pyfunction]
    #[pyo3(signature = (reasoning, multimodal, *, prefer_equal_names = false))]
    fn align(
        py: Python<'_>,
        reasoning: Vec<(String, Vec<usize>)>,
        multimodal: Vec<(String, Vec<usize>)>,
        prefer_equal_names: bool,
    ) -> PyResult<Aligned> {
        let named = |list: Vec<(String, Vec<usize>)>| -> Vec<Named> {
            list.into_iter().map(|(name, shape)| Named { name, shape }).collect()
        };
        let (reasoning, multimodal) = (named(reasoning), named(multimodal));
        let ties = if prefer_equal_names { Ties::PreferEqualNames } else { Ties::Refuse };
        let alignment = py.detach(|| align_core(&reasoning, &multimodal, ties)).map_err(to_py)?;
        Ok(named_alignment(alignment, &reasoning, &multimodal))
    }

    fn named_alignment(alignment: Alignment, reasoning: &[Named], multimodal: &[Named]) -> Aligned {
        let reasons = |list: Vec<(usize, String)>, model: &[Named]| {
            list.into_iter().map(|(at, reason)| (model[at].name.clone(), reason)).collect()
        };
        let names = |(source, name): (usize, usize)| {
            (reasoning[source].name.clone(), multimodal[name].name.clone())
        };
        Aligned {
            prefixes: alignment.prefixes,
            pairs: alignment.pairs.into_iter().map(names).collect(),
            unmatched_reasoning: reasons(alignment.unmatched_reasoning, reasoning),
            unmatched_multimodal: reasons(alignment.unmatched_multimodal, multimodal),
            layer_conflict: alignment.layer_conflict,
            alternatives: alignment.alternatives,
        }
    }

    /// Stream pairs of tensors; return one dictionary of moments for each, and the most bytes that
    /// buffers took at a time.
    ///
    /// `memory` bounds the buffers and what is mapped, in bytes; `prefetch` is how many bytes a disk is
    /// asked for ahead.
    #[pyfunction]
    #[pyo3(signature = (
        reasoning, multimodal, pairs, *, threads, memory = None, writer = None, progress = None,
        prefetch = None
    ))]
    #[expect(clippy::too_many_arguments, reason = "they are the keywords of a Python function")]
    fn stream<'py>(
        py: Python<'py>,
        reasoning: &Checkpoint,
        multimodal: &Checkpoint,
        pairs: Vec<(SourceNames, String)>,
        threads: usize,
        memory: Option<usize>,
        writer: Option<&DeltaWriter>,
        progress: Option<Py<PyAny>>,
        prefetch: Option<u64>,
    ) -> PyResult<(Bound<'py, PyList>, usize)> {
        let guard = writer.map(DeltaWriter::hold).transpose()?;
        let writer = match &guard {
            None => None,
            Some(inner) => Some(inner.as_ref().ok_or_else(finished)?),
        };
        let pairs = resolve(reasoning, multimodal, &pairs)?;
        let mut options = options(threads, memory);
        options.prefetch_nbytes = prefetch.unwrap_or(options.prefetch_nbytes);
        let sink = writer.map_or(Sink::None, Sink::Files);
        let outcome = detached(py, progress, |tick| run(&pairs, sink, &options, tick))?;
        let rows = outcome.moments.iter().map(|m| row(py, m)).collect::<PyResult<Vec<_>>>()?;
        Ok((PyList::new(py, rows)?, outcome.peak_nbytes))
    }

    fn options(threads: usize, memory: Option<usize>) -> Options {
        let unbounded = Options::new(threads);
        Options { memory: memory.unwrap_or(unbounded.memory), ..unbounded }
    }

    /// Fill a writable buffer with one difference, or with elements [start, stop) of it, and return
    /// the moments of those. A tensor put together from blocks is subtracted whole.
    #[pyfunction]
    #[pyo3(signature = (
        reasoning, multimodal, pair, buffer, *, dtype, threads, memory = None, elements = None
    ))]
    #[expect(clippy::too_many_arguments, reason = "they are the keywords of a Python function")]
    fn subtract_into<'py>(
        py: Python<'py>,
        reasoning: &Checkpoint,
        multimodal: &Checkpoint,
        pair: (SourceNames, String),
        buffer: &Bound<'py, PyAny>,
        dtype: &str,
        threads: usize,
        memory: Option<usize>,
        elements: Option<(usize, usize)>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let mut buffer = Writable::new(buffer)?;
        let mut pairs = resolve(reasoning, multimodal, &[pair])?;
        let sliced;
        if let Some((start, stop)) = elements {
            let Source::Whole(reasoning) = pairs[0].reasoning else {
                return Err(PyValueError::new_err(
                    "a tensor put together from blocks is subtracted whole",
                ));
            };
            let multimodal = pairs[0].multimodal;
            if reasoning.tensor.shape != multimodal.tensor.shape {
                return Err(PyValueError::new_err("elements of tensors that differ in shape"));
            }
            let slice = |operand: &Operand<'_>| operand.tensor.elements(start, stop).map_err(to_py);
            sliced = (slice(&reasoning)?, slice(&multimodal)?);
            pairs[0] = Pair {
                reasoning: Source::Whole(Operand {
                    tensor: &sliced.0,
                    scales: reasoning.scales.map(|scales| scales.from_element(start)),
                    ..reasoning
                }),
                multimodal: Operand {
                    tensor: &sliced.1,
                    scales: multimodal.scales.map(|scales| scales.from_element(start)),
                    ..multimodal
                },
            };
        }
        let sink = Sink::Memory(parse_dtype(dtype)?, buffer.bytes());
        let options = options(threads, memory);
        let outcome = detached(py, None, |tick| run(&pairs, sink, &options, tick))?;
        row(py, &outcome.moments[0])
    }

    /// Moments of tensors in memory, pair by pair: (‖left‖², ‖right‖², left · right).
    ///
    /// Each side is a contiguous buffer of bytes and its dtype. NaN or infinity on either side
    /// makes all three numbers NaN, so that no caller takes a partial sum for a whole one.
    #[pyfunction]
    #[pyo3(signature = (left, right, *, threads, float64 = false))]
    fn measure(
        py: Python<'_>,
        left: Vec<(Bound<'_, PyAny>, String)>,
        right: Vec<(Bound<'_, PyAny>, String)>,
        threads: usize,
        float64: bool,
    ) -> PyResult<Vec<(f64, f64, f64)>> {
        if left.len() != right.len() {
            return Err(PyValueError::new_err("both sides need the same number of tensors"));
        }
        let buffers = |side: Vec<(Bound<'_, PyAny>, String)>| {
            side.iter()
                .map(|(object, dtype)| Ok((Readable::new(object)?, parse_dtype(dtype)?)))
                .collect::<PyResult<Vec<_>>>()
        };
        let (left, right) = (buffers(left)?, buffers(right)?);
        let moments = py
            .detach(|| {
                let pairs = left
                    .iter()
                    .zip(&right)
                    .map(|((a, a_dtype), (b, b_dtype))| {
                        let left = kernel::Elements::new(*a_dtype, a.bytes())?;
                        Ok((left, kernel::Elements::new(*b_dtype, b.bytes())?))
                    })
                    .collect::<drift_fast_core::Result<Vec<_>>>()?;
                let precision = if float64 { Precision::Float64 } else { Precision::Fast };
                measure_core(&pairs, precision, threads)
            })
            .map_err(to_py)?;
        Ok(moments
            .iter()
            .map(|m| {
                if m.nonfinite_reasoning + m.nonfinite_multimodal > 0 {
                    (f64::NAN, f64::NAN, f64::NAN)
                } else {
                    (m.reasoning_sq, m.multimodal_sq, m.dot)
                }
            })
            .collect())
    }

    /// Subtract c·Δ from every tensor in place: tensors and deltas as (bytes, dtype), one c each.
    #[pyfunction]
    #[pyo3(signature = (tensors, deltas, coefficients, *, threads))]
    fn subtract_scaled(
        py: Python<'_>,
        tensors: Vec<(Bound<'_, PyAny>, String)>,
        deltas: Vec<(Bound<'_, PyAny>, String)>,
        coefficients: Vec<f64>,
        threads: usize,
    ) -> PyResult<()> {
        if tensors.len() != deltas.len() || tensors.len() != coefficients.len() {
            return Err(PyValueError::new_err("each tensor needs one delta and one coefficient"));
        }
        let mut targets = tensors
            .iter()
            .map(|(object, dtype)| Ok((Writable::new(object)?, parse_dtype(dtype)?)))
            .collect::<PyResult<Vec<_>>>()?;
        let sources = deltas
            .iter()
            .map(|(object, dtype)| Ok((Readable::new(object)?, parse_dtype(dtype)?)))
            .collect::<PyResult<Vec<_>>>()?;
        py.detach(|| {
            let steps = targets
                .iter_mut()
                .zip(&sources)
                .zip(&coefficients)
                .map(|(((target, dtype), (source, delta_dtype)), &c)| {
                    let delta = kernel::Elements::new(*delta_dtype, source.bytes())?;
                    Ok(Step { dtype: *dtype, tensor: target.bytes(), delta, c })
                })
                .collect::<drift_fast_core::Result<Vec<_>>>()?;
            subtract_all(steps, threads)
        })
        .map_err(to_py)
    }

    /// What a multimodal tensor is subtracted from: the name of a tensor, or parts of several, each
    /// as (name, first row, end row, first column, end column, offset, row stride, column stride).
    #[derive(FromPyObject)]
    enum SourceNames {
        Whole(String),
        Parts(Vec<Rectangle>),
    }

    type Rectangle = (String, usize, usize, usize, usize, usize, usize, usize);

    fn resolve<'a>(
        reasoning: &'a Checkpoint,
        multimodal: &'a Checkpoint,
        pairs: &[(SourceNames, String)],
    ) -> PyResult<Vec<Pair<'a>>> {
        pairs
            .iter()
            .map(|(source, name)| {
                let multimodal = side(multimodal, name)?;
                let reasoning = minuend(reasoning, source, &multimodal.tensor.shape)?;
                Ok(Pair { reasoning, multimodal })
            })
            .collect()
    }

    fn side<'a>(checkpoint: &'a Checkpoint, name: &str) -> PyResult<Operand<'a>> {
        checkpoint.inner.operand(name, checkpoint.block).map_err(to_py)
    }

    /// What a tensor of that shape is paired with.
    fn minuend<'a>(
        checkpoint: &'a Checkpoint,
        source: &SourceNames,
        shape: &[usize],
    ) -> PyResult<Source<'a>> {
        let parts = match source {
            SourceNames::Whole(name) => return Ok(Source::Whole(side(checkpoint, name)?)),
            SourceNames::Parts(parts) => parts,
        };
        let parts = parts
            .iter()
            .map(|(name, top, bottom, left, right, offset, down, across)| {
                Ok(Block {
                    source: side(checkpoint, name)?,
                    rows: *top..*bottom,
                    columns: *left..*right,
                    offset: *offset,
                    row_stride: *down,
                    column_stride: *across,
                })
            })
            .collect::<PyResult<_>>()?;
        Ok(Source::Blocks(Blocks::new(shape, parts).map_err(to_py)?))
    }

    /// A merged model's directory being written; it takes its name at `commit`.
    #[pyclass(frozen, module = "drift_fast._core")]
    struct ModelWriter {
        inner: Mutex<Option<Writer>>,
    }

    #[pymethods]
    impl ModelWriter {
        /// Reserve the space for tensors of the multimodal checkpoint, each in the given dtype or in
        /// its own, and for files of the given sizes.
        #[new]
        #[pyo3(signature = (
            target, multimodal, tensors, *, max_shard_nbytes, overwrite, description_nbytes, files
        ))]
        #[expect(clippy::too_many_arguments, reason = "they are the keywords of a Python function")]
        fn new(
            py: Python<'_>,
            target: PathBuf,
            multimodal: &Checkpoint,
            tensors: Vec<(String, Option<String>)>,
            max_shard_nbytes: u64,
            overwrite: bool,
            description_nbytes: u64,
            files: Vec<(String, u64)>,
        ) -> PyResult<Self> {
            let slots = tensors
                .into_iter()
                .map(|(name, dtype)| {
                    let tensor = multimodal.inner.tensor(&name).map_err(to_py)?.1;
                    let plain =
                        |dtype| Storage::Plain(dtype).slots(name.clone(), tensor.shape.clone());
                    Ok(match dtype {
                        Some(dtype) => plain(parse_dtype(&dtype)?),
                        None => vec![Slot {
                            name: name.clone(),
                            shape: tensor.shape.clone(),
                            dtype: tensor.dtype,
                        }],
                    })
                })
                .collect::<PyResult<Vec<_>>>()?
                .concat();
            let spec = OutputSpec {
                target: &target,
                slots: &slots,
                max_shard_nbytes,
                description_nbytes,
                overwrite,
            };
            let create = || Writer::create_model(&spec, &files);
            let inner = py.detach(create).map_err(to_py)?;
            Ok(Self { inner: Mutex::new(Some(inner)) })
        }

        /// Write one of the files that were announced.
        fn add(&self, py: Python<'_>, name: &str, buffer: &Bound<'_, PyAny>) -> PyResult<()> {
            let buffer = Readable::new(buffer)?;
            let guard = hold(&self.inner)?;
            let writer = guard.as_ref().ok_or_else(finished)?;
            py.detach(|| writer.add(name, buffer.bytes())).map_err(to_py)
        }

        /// Flush, add `merge.json` with this text, and give the directory its name.
        fn commit(&self, py: Python<'_>, description: &str) -> PyResult<()> {
            let writer = hold(&self.inner)?.take().ok_or_else(finished)?;
            py.detach(|| writer.commit(description)).map_err(to_py)
        }

        /// Remove what was written, unless it was committed.
        fn abort(&self) -> PyResult<()> {
            drop(hold(&self.inner)?.take());
            Ok(())
        }
    }

    /// What is merged into a tensor: sources in the reasoning checkpoint and the base, the dtype of
    /// the result, and both weights.
    type Blended = (SourceNames, Option<SourceNames>, String, f64, f64);

    /// Merge tensors into a writer's slots, in their order, or copy those that nothing is given for;
    /// return what was found of each merged one, and the most bytes that buffers took at a time.
    #[pyfunction]
    #[pyo3(signature = (
        reasoning, multimodal, base, tensors, writer, *, method, density = None, seed = 0, threads,
        memory = None, progress = None
    ))]
    #[expect(clippy::too_many_arguments, reason = "they are the keywords of a Python function")]
    fn merge<'py>(
        py: Python<'py>,
        reasoning: &Checkpoint,
        multimodal: &Checkpoint,
        base: Option<&Checkpoint>,
        tensors: Vec<(String, Option<Blended>)>,
        writer: &ModelWriter,
        method: &str,
        density: Option<f64>,
        seed: u64,
        threads: usize,
        memory: Option<usize>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<(Vec<Option<Bound<'py, PyDict>>>, usize)> {
        let needs =
            || density.ok_or_else(|| PyValueError::new_err(format!("{method} needs a density")));
        let method = match method {
            "layer_swap" => Method::Take,
            "linear" => Method::Linear,
            "task_arithmetic" => Method::TaskArithmetic,
            "slerp" => Method::Slerp,
            "ties" => Method::Ties { density: needs()? },
            "dare_linear" => Method::DareLinear { density: needs()?, seed },
            "dare_ties" => Method::DareTies { density: needs()?, seed },
            other => return Err(PyValueError::new_err(format!("unknown method {other:?}"))),
        };
        let jobs = tensors
            .iter()
            .map(|(name, blended)| {
                let Some((source, of_base, dtype, weight, multimodal_weight)) = blended else {
                    let (shard, tensor) = multimodal.inner.tensor(name).map_err(to_py)?;
                    let multimodal = Operand { shard, tensor, scales: None };
                    return Ok(Job { multimodal, blend: None });
                };
                let target = side(multimodal, name)?;
                let shape = &target.tensor.shape;
                let base = match (base, of_base) {
                    (Some(base), Some(source)) => Some(minuend(base, source, shape)?),
                    (None, None) => None,
                    _ => {
                        return Err(PyValueError::new_err("a base and a tensor of it go together"));
                    }
                };
                let blend = Blend {
                    reasoning: minuend(reasoning, source, shape)?,
                    base,
                    dtype: parse_dtype(dtype)?,
                    weight: *weight,
                    multimodal_weight: *multimodal_weight,
                };
                Ok(Job { multimodal: target, blend: Some(blend) })
            })
            .collect::<PyResult<Vec<_>>>()?;
        let guard = hold(&writer.inner)?;
        let writer = guard.as_ref().ok_or_else(finished)?;
        let options = options(threads, memory);
        let outcome =
            detached(py, progress, |tick| run_merge(&jobs, method, writer, &options, tick))?;
        let rows = outcome
            .found
            .iter()
            .map(|found| {
                let Some(found) = found else { return Ok(None) };
                let row = PyDict::new(py);
                row.set_item("merged", found.merged)?;
                row.set_item("nonfinite_reasoning", found.nonfinite_reasoning)?;
                row.set_item("nonfinite_multimodal", found.nonfinite_multimodal)?;
                row.set_item("nonfinite_base", found.nonfinite_base)?;
                row.set_item("overflow", found.overflow)?;
                row.set_item("kept_reasoning", found.kept_reasoning)?;
                row.set_item("kept_multimodal", found.kept_multimodal)?;
                row.set_item("cosine", found.cosine)?;
                Ok(Some(row))
            })
            .collect::<PyResult<Vec<_>>>()?;
        Ok((rows, outcome.peak_nbytes))
    }

    /// Correlate samples of each pair's reasoning tensor with those of every multimodal one.
    ///
    /// The pairs are one module in each layer. Returns the correlations row by row, and the number of
    /// elements that each was taken over.
    #[pyfunction]
    fn correlate_samples(
        py: Python<'_>,
        reasoning: &Checkpoint,
        multimodal: &Checkpoint,
        pairs: Vec<(SourceNames, String)>,
    ) -> PyResult<(Vec<f64>, usize)> {
        let pairs = resolve(reasoning, multimodal, &pairs)?;
        py.detach(|| correlate(&pairs)).map_err(to_py)
    }

    /// Run with the interpreter detached, coming back for signals and the progress callback.
    fn detached<T: Send>(
        py: Python<'_>,
        progress: Option<Py<PyAny>>,
        work: impl FnOnce(&mut dyn FnMut(Progress) -> ControlFlow<()>) -> drift_fast_core::Result<T>
        + Send,
    ) -> PyResult<T> {
        let mut raised: Option<PyErr> = None;
        let mut tick = |state: Progress| {
            let answer = Python::attach(|py| {
                py.check_signals()?;
                if let Some(progress) = &progress {
                    progress.call1(py, (state.tensors, state.nbytes))?;
                }
                Ok(())
            });
            match answer {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    raised = Some(error);
                    ControlFlow::Break(())
                }
            }
        };
        let result = py.detach(|| work(&mut tick));
        match raised {
            Some(error) => Err(error),
            None => result.map_err(to_py),
        }
    }

    fn row<'py>(py: Python<'py>, moments: &Moments) -> PyResult<Bound<'py, PyDict>> {
        let row = PyDict::new(py);
        row.set_item("delta_sq", moments.delta_sq)?;
        row.set_item("written_sq", moments.written_sq)?;
        row.set_item("reasoning_sq", moments.reasoning_sq)?;
        row.set_item("multimodal_sq", moments.multimodal_sq)?;
        row.set_item("dot", moments.dot)?;
        row.set_item("max_abs", moments.max_abs)?;
        row.set_item("zeros", moments.zeros)?;
        row.set_item("agreeing", moments.agreeing)?;
        row.set_item("stored_dot", moments.stored_dot)?;
        row.set_item("flushed", moments.flushed)?;
        row.set_item("nonfinite_reasoning", moments.nonfinite_reasoning)?;
        row.set_item("nonfinite_multimodal", moments.nonfinite_multimodal)?;
        row.set_item("overflow", moments.overflow)?;
        Ok(row)
    }

    fn parse_dtype(name: &str) -> PyResult<Dtype> {
        match name {
            "bfloat16" => Ok(Dtype::BF16),
            "float16" => Ok(Dtype::F16),
            "float32" => Ok(Dtype::F32),
            "float64" => Ok(Dtype::F64),
            other => Err(PyValueError::new_err(format!(
                "dtype must be 'bfloat16', 'float16', 'float32' or 'float64', got {other:?}"
            ))),
        }
    }

    fn parse_storage(name: &str) -> PyResult<Storage> {
        match name {
            "int8" => Ok(Storage::Int8),
            plain => parse_dtype(plain).map(Storage::Plain),
        }
    }

    /// A Python buffer that stays exported, and so alive and in place, while Rust fills it.
    struct Writable {
        buffer: PyBuffer<u8>,
    }

    impl Writable {
        fn new(object: &Bound<'_, PyAny>) -> PyResult<Self> {
            let buffer = PyBuffer::<u8>::get(object)?;
            if buffer.readonly() || !buffer.is_c_contiguous() {
                return Err(PyValueError::new_err("the buffer must be writable and contiguous"));
            }
            Ok(Self { buffer })
        }

        fn bytes(&mut self) -> &mut [u8] {
            if self.buffer.len_bytes() == 0 {
                return &mut [];
            }
            // SAFETY: the export keeps the memory alive, in place and of this length; it is
            // writable, contiguous and of unsigned bytes, for which every bit pattern is valid.
            // That no Python thread touches it meanwhile, and that no two buffers of a call
            // overlap, is what the callers guarantee: drift_fast.delta passes tensors that nobody
            // else has seen, drift_fast.inject the gradients of distinct parameters between
            // backward and the optimizer's step.
            #[allow(unsafe_code)]
            unsafe {
                std::slice::from_raw_parts_mut(
                    self.buffer.buf_ptr().cast::<u8>(),
                    self.buffer.len_bytes(),
                )
            }
        }
    }

    /// A Python buffer that stays exported, and so alive and in place, while Rust reads it.
    struct Readable {
        buffer: PyBuffer<u8>,
    }

    impl Readable {
        fn new(object: &Bound<'_, PyAny>) -> PyResult<Self> {
            let buffer = PyBuffer::<u8>::get(object)?;
            if !buffer.is_c_contiguous() {
                return Err(PyValueError::new_err("the buffer must be contiguous"));
            }
            Ok(Self { buffer })
        }

        fn bytes(&self) -> &[u8] {
            if self.buffer.len_bytes() == 0 {
                return &[];
            }
            // SAFETY: the export keeps the memory alive, in place and of this length; it is
            // contiguous and of unsigned bytes. That nobody writes to it meanwhile is what the
            // caller, drift_fast.inject, guarantees: it measures between backward and the
            // optimizer's step, when no thread touches a gradient.
            #[allow(unsafe_code)]
            unsafe {
                std::slice::from_raw_parts(
                    self.buffer.buf_ptr().cast::<u8>(),
                    self.buffer.len_bytes(),
                )
            }
        }
    }
}
