//! What a tensor's name says: its components without wrappers, its layer, and its last components.

use std::borrow::Cow;
use std::collections::HashMap;

use crate::error::{Error, Result};

/// Name components that wrappers insert and that say nothing about the model.
const WRAPPERS: [&str; 5] =
    ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"];

/// A tensor's name and dimensions.
#[derive(Debug, Clone)]
pub struct Named {
    /// As on disk or in memory.
    pub name: String,
    /// Outermost first.
    pub shape: Vec<usize>,
}

/// The tensors of one model by name.
pub(super) struct TensorIndex<'a> {
    pub(super) tensors: &'a [Named],
    /// Names without wrappers.
    pub(super) names: Vec<Cow<'a, str>>,
    by_name: HashMap<Cow<'a, str>, usize>,
}

impl<'a> TensorIndex<'a> {
    pub(super) fn new(tensors: &'a [Named]) -> Result<Self> {
        let names: Vec<_> = tensors.iter().map(|tensor| unwrapped(&tensor.name)).collect();
        let mut by_name = HashMap::with_capacity(names.len());
        for (position, name) in names.iter().enumerate() {
            if let Some(other) = by_name.insert(name.clone(), position) {
                return Err(Error::Alignment(format!(
                    "{:?} and {:?} are the same name without wrappers",
                    tensors[other].name, tensors[position].name
                )));
            }
        }
        Ok(Self { tensors, names, by_name })
    }

    pub(super) fn shape(&self, position: usize) -> &[usize] {
        &self.tensors[position].shape
    }

    pub(super) fn find(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// Positions of the parameters of numbered layers.
    pub(super) fn layer_positions(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.names.len()).filter(|&position| in_layer(&self.names[position]))
    }
}

fn unwrapped(name: &str) -> Cow<'_, str> {
    if !name.split('.').any(|part| WRAPPERS.contains(&part)) {
        return Cow::Borrowed(name);
    }
    Cow::Owned(
        name.split('.').filter(|part| !WRAPPERS.contains(part)).collect::<Vec<_>>().join("."),
    )
}

pub(super) fn is_number(component: &str) -> bool {
    !component.is_empty() && component.bytes().all(|byte| byte.is_ascii_digit())
}

pub(super) fn in_layer(name: &str) -> bool {
    name.split('.').any(is_number)
}

pub(super) fn join(prefix: &str, suffix: &str) -> String {
    if prefix.is_empty() { suffix.to_owned() } else { format!("{prefix}.{suffix}") }
}

pub(super) fn suffix_after<'n>(name: &'n str, prefix: &str) -> Option<&'n str> {
    if prefix.is_empty() { Some(name) } else { name.strip_prefix(prefix)?.strip_prefix('.') }
}

/// The last two components of a name.
pub(super) fn tail(name: &str) -> &str {
    name.rmatch_indices('.').nth(1).map_or(name, |(at, _)| &name[at + 1..])
}

/// The tensors outside the layers by the last two components of their names.
pub(super) struct Tails<'a> {
    pub(super) reasoning: HashMap<&'a str, Vec<usize>>,
    pub(super) multimodal: HashMap<&'a str, Vec<usize>>,
}

impl<'a> Tails<'a> {
    pub(super) fn new(reasoning: &'a TensorIndex<'_>, multimodal: &'a TensorIndex<'_>) -> Self {
        let of = |index: &'a TensorIndex<'_>| {
            let mut found: HashMap<&str, Vec<usize>> = HashMap::new();
            for (position, name) in index.names.iter().enumerate() {
                if !in_layer(name) {
                    found.entry(tail(name)).or_default().push(position);
                }
            }
            found
        };
        Self { reasoning: of(reasoning), multimodal: of(multimodal) }
    }
}
