//! The only way into the core: detach the interpreter, and return with a Python exception.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

use drift_fast_core::stream::{Part, Progress};
use drift_fast_core::{Error, Result, interrupt};
use pyo3::prelude::*;

use crate::errors::to_py;

/// A Python function that is called with the numbers of tensors and bytes that are done.
pub(crate) type Callback = Py<PyAny>;

/// Run with the interpreter detached; what a signal raises ends the work and is raised here.
pub(crate) fn detached<T: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> Result<T> + Send,
) -> PyResult<T> {
    let raised = Arc::new(Mutex::new(None));
    let kept = Arc::clone(&raised);
    let check = move || match Python::attach(|py| py.check_signals()) {
        Ok(()) => ControlFlow::Continue(()),
        Err(error) => {
            *kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            ControlFlow::Break(())
        }
    };
    let result = py.detach(|| interrupt::with_check(check, work));
    let raised = raised.lock().unwrap_or_else(PoisonError::into_inner).take();
    match (raised, result) {
        (Some(error), Ok(_) | Err(Error::Interrupted)) => Err(error),
        (_, result) => result.map_err(to_py),
    }
}

/// Run with the interpreter detached, and attach it for signals and the progress callback.
///
/// An exception from either ends the work and is raised here, unless the work itself failed.
pub(crate) fn interruptible<T: Send>(
    py: Python<'_>,
    progress: Option<Callback>,
    work: impl FnOnce(&mut dyn FnMut(Progress) -> ControlFlow<()>) -> Result<T> + Send,
) -> PyResult<T> {
    let call = |py: Python<'_>, state: Progress| match &progress {
        None => Ok(()),
        Some(progress) => progress.call1(py, (state.tensors, state.nbytes)).map(drop),
    };
    answered(py, call, |tick| work(tick))
}

/// As [`interruptible`], with a callback that takes what came into memory and answers which of its
/// calls are over; without one, all are at once.
pub(crate) fn landing<T: Send>(
    py: Python<'_>,
    landed: Option<Callback>,
    work: impl FnOnce(&mut dyn FnMut(&[Part]) -> ControlFlow<(), usize>) -> Result<T> + Send,
) -> PyResult<T> {
    let mut calls = 0;
    let call = |py: Python<'_>, parts: Vec<PartFields>| {
        calls += 1;
        match &landed {
            None => Ok(calls),
            Some(landed) => landed.call1(py, (parts,))?.extract(py),
        }
    };
    answered(py, call, |tick| {
        work(&mut |parts| {
            let fields =
                |part: &Part| (part.run, part.elements.start, part.elements.end, part.offset);
            tick(parts.iter().map(fields).collect())
        })
    })
}

/// Run, first and end element, and offset in the ring.
type PartFields = (usize, usize, usize, usize);

fn answered<T: Send, S: Send, A: Send>(
    py: Python<'_>,
    mut call: impl FnMut(Python<'_>, S) -> PyResult<A> + Send,
    work: impl FnOnce(&mut dyn FnMut(S) -> ControlFlow<(), A>) -> Result<T> + Send,
) -> PyResult<T> {
    let mut raised: Option<PyErr> = None;
    let mut tick = |state: S| {
        let answer = Python::attach(|py| {
            py.check_signals()?;
            call(py, state)
        });
        match answer {
            Ok(answer) => ControlFlow::Continue(answer),
            Err(error) => {
                raised = Some(error);
                ControlFlow::Break(())
            }
        }
    };
    let result = py.detach(|| work(&mut tick));
    match (raised, result) {
        (Some(error), Ok(_) | Err(Error::Interrupted)) => Err(error),
        (_, result) => result.map_err(to_py),
    }
}
