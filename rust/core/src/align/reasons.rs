//! Why a tensor has no match, in words.

use std::collections::{BTreeMap, BTreeSet};

use super::counts::Prefixes;
use super::names::{Tails, TensorIndex, in_layer, is_number, join, suffix_after, tail};
use super::prefixes::Models;
use crate::error::Error;

impl Models<'_> {
    /// Match a reasoning tensor outside the layers by the last two components of its name, or say
    /// why it has no match.
    pub(super) fn place_leftover(
        &self,
        prefixes: &Prefixes,
        position: usize,
        match_of: &[Option<usize>],
        tails: &Tails<'_>,
    ) -> Result<usize, String> {
        if let Some(other) = self.namesake(prefixes, position) {
            return Err(self.reasoning_shape_differs(position, other));
        }
        let Self { reasoning, multimodal } = self;
        let name = &reasoning.names[position];
        if in_layer(name) {
            return Err(match suffix_after(name, &prefixes.0) {
                Some(suffix) => format!("the other model has no {}", join(&prefixes.1, suffix)),
                None => format!("outside the aligned prefix {:?}", prefixes.0),
            });
        }
        let alike = tails.multimodal.get(tail(name)).map_or(&[][..], Vec::as_slice);
        let candidates: Vec<usize> =
            alike.iter().copied().filter(|&other| match_of[other].is_none()).collect();
        let fitting: Vec<usize> =
            candidates.iter().copied().filter(|&other| self.same_shape(position, other)).collect();
        match (&fitting[..], &candidates[..]) {
            (&[only], _) => Ok(only),
            ([], []) => Err("the other model has no tensor of that name".to_owned()),
            ([], &[other, ..]) => Err(self.reasoning_shape_differs(position, other)),
            (&[one, two, ..], _) => Err(format!(
                "fits both {} and {}",
                multimodal.tensors[one].name, multimodal.tensors[two].name
            )),
        }
    }

    /// Why a multimodal tensor has no match.
    pub(super) fn reason_of_multimodal(
        &self,
        prefixes: &Prefixes,
        other: usize,
        tails: &Tails<'_>,
    ) -> String {
        let Self { reasoning, multimodal } = self;
        let name = &multimodal.names[other];
        if let Some(suffix) = suffix_after(name, &prefixes.1) {
            let expected = join(&prefixes.0, suffix);
            return match reasoning.find(&expected) {
                Some(position) => self.multimodal_shape_differs(position, other),
                None => format!("the other model has no {expected}"),
            };
        }
        // A head is outside the prefix, and the other model may have it in another shape.
        let alike = tails.reasoning.get(tail(name)).filter(|_| !in_layer(name));
        let head = alike.into_iter().flatten().find(|&&position| !self.same_shape(position, other));
        match head {
            Some(&position) => self.multimodal_shape_differs(position, other),
            None => format!("outside the language backbone {:?}", prefixes.1),
        }
    }

    fn reasoning_shape_differs(&self, position: usize, other: usize) -> String {
        let found = &self.multimodal.tensors[other];
        let shape = self.reasoning.shape(position);
        format!("shape {shape:?} differs from {:?} of {}", found.shape, found.name)
    }

    fn multimodal_shape_differs(&self, position: usize, other: usize) -> String {
        let found = &self.reasoning.tensors[position];
        let shape = self.multimodal.shape(other);
        format!("shape {shape:?} differs from {:?} of {}", found.shape, found.name)
    }

    /// Layer counts that differ under a container that both models have, as a sentence.
    pub(super) fn layer_conflict(&self, prefixes: &Prefixes) -> String {
        let reasoning = layers_of(&self.reasoning, &prefixes.0);
        let multimodal = layers_of(&self.multimodal, &prefixes.1);
        for (container, layers) in &reasoning {
            if let Some(others) = multimodal.get(container)
                && layers != others
            {
                return format!(
                    "layer counts differ under {:?}: {} has layers {}, {} has {}",
                    container,
                    join(&prefixes.0, container),
                    spans(layers),
                    join(&prefixes.1, container),
                    spans(others)
                );
            }
        }
        String::new()
    }

    /// The error where no tensor matches by name and shape.
    pub(super) fn nothing_matches(&self, named: Option<(Prefixes, usize)>) -> Error {
        let Self { reasoning, multimodal } = self;
        let Some((prefixes, count)) = named else {
            let example =
                |index: &TensorIndex<'_>| index.tensors.first().map_or("", |t| &t.name).to_owned();
            return Error::Alignment(format!(
                "no tensor of one model matches one of the other: names such as {:?} and {:?} share \
                 no ending. Are these two models of the same architecture?",
                example(reasoning),
                example(multimodal)
            ));
        };
        let examples: Vec<String> = (0..reasoning.names.len())
            .filter_map(|position| Some((position, self.namesake(&prefixes, position)?)))
            .take(3)
            .map(|(position, other)| {
                format!(
                    "{} {:?} and {} {:?}",
                    reasoning.tensors[position].name,
                    reasoning.shape(position),
                    multimodal.tensors[other].name,
                    multimodal.shape(other)
                )
            })
            .collect();
        Error::Alignment(format!(
            "{} names match under {:?} → {:?} but every shape differs: {}. The two models have \
             different sizes; choose a reasoning model of the same backbone",
            count,
            prefixes.0,
            prefixes.1,
            examples.join("; ")
        ))
    }
}

/// The layer numbers under each numbered container.
fn layers_of(index: &TensorIndex<'_>, prefix: &str) -> BTreeMap<String, BTreeSet<u64>> {
    let mut layers: BTreeMap<String, BTreeSet<u64>> = BTreeMap::new();
    for suffix in index.names.iter().filter_map(|name| suffix_after(name, prefix)) {
        let parts: Vec<&str> = suffix.split('.').collect();
        if let Some(at) = parts.iter().position(|part| is_number(part))
            && let Ok(layer) = parts[at].parse()
        {
            layers.entry(parts[..at].join(".")).or_default().insert(layer);
        }
    }
    layers
}

fn spans(layers: &BTreeSet<u64>) -> String {
    match (layers.first(), layers.last()) {
        (Some(first), Some(last)) => format!("{first} to {last} ({} in all)", layers.len()),
        _ => "none".to_owned(),
    }
}
