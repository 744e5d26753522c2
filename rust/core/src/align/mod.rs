//! Which tensor of one model is which of the other, by names and shapes alone.
//!
//! There is no table of model families. Names are cut into a prefix and a suffix in every way that
//! keeps two components of suffix; the pair of prefixes that makes most (suffix, shape) equal wins.
//! What remains, such as a head outside the backbone, is matched by its last two components where
//! that is unambiguous. A second pair of prefixes that explains every layer parameter as well is
//! refused, so nothing here guesses between two language models.

pub mod compose;
mod counts;
mod names;
pub mod pair;
mod prefixes;
mod reasons;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod reference;
pub mod similarity;

use crate::error::Result;
use crate::interrupt;
use counts::{Cuts, Prefixes};
pub use names::Named;
use names::{Tails, TensorIndex};
use prefixes::Models;
pub use prefixes::Ties;

/// Other pairs of prefixes that are shown.
const SHOWN: usize = 3;

/// Which tensors of two models match.
#[derive(Debug, Clone)]
pub struct Alignment {
    /// What the reasoning model's names begin with, and the multimodal model's in its place.
    pub prefixes: (String, String),
    /// Index of the reasoning tensor and of the multimodal one, in the order of the latter.
    pub pairs: Vec<(usize, usize)>,
    /// Index of each reasoning tensor without a match, and why.
    pub unmatched_reasoning: Vec<(usize, String)>,
    /// Index of each multimodal tensor without a match, and why.
    pub unmatched_multimodal: Vec<(usize, String)>,
    /// Layer counts that differ, as a sentence; empty where they agree.
    pub layer_conflict: String,
    /// Other pairs of prefixes that match some of the same tensors, with how many, most first.
    pub alternatives: Vec<(String, String, usize)>,
}

/// Match the tensors of two models.
///
/// # Errors
/// Nothing matches, two names are equal without wrappers, two pairs of prefixes explain every
/// layer parameter of the reasoning model, or names that are too alike or too many to be matched.
pub fn align(reasoning: &[Named], multimodal: &[Named], ties: Ties) -> Result<Alignment> {
    let models = Models {
        reasoning: TensorIndex::new(reasoning)?,
        multimodal: TensorIndex::new(multimodal)?,
    };
    let cuts = Cuts::new(&models.reasoning, &models.multimodal)?;
    let named = cuts.count(false)?.best();
    let by_shape = cuts.count(true)?;
    let Some((shaped, most)) = by_shape.best() else { return Err(models.nothing_matches(named)) };
    // Where shapes differ nearly everywhere, the few that agree by chance must not pick the prefix.
    let chosen = named.filter(|(_, count)| *count >= 2 * most).map_or(shaped, |(named, _)| named);
    models.refuse_ambiguity(&chosen, &by_shape, ties)?;
    let others = by_shape.alternatives(&chosen, SHOWN).into_iter();
    let others = others.map(|((first, second), count)| (first, second, count)).collect();
    drop(by_shape);
    matched(&models, chosen, others)
}

fn matched(
    models: &Models<'_>,
    prefixes: Prefixes,
    alternatives: Vec<(String, String, usize)>,
) -> Result<Alignment> {
    let Models { reasoning, multimodal } = models;
    let mut match_of: Vec<Option<usize>> = vec![None; multimodal.names.len()];
    let mut unmatched_reasoning = Vec::new();
    let mut leftover = Vec::new();
    for position in 0..reasoning.names.len() {
        match models.matched(&prefixes, position) {
            Some(other) => match_of[other] = Some(position),
            None => leftover.push(position),
        }
    }
    let tails = Tails::new(reasoning, multimodal);
    for position in leftover {
        interrupt::poll()?;
        match models.place_leftover(&prefixes, position, &match_of, &tails) {
            Ok(other) => match_of[other] = Some(position),
            Err(reason) => unmatched_reasoning.push((position, reason)),
        }
    }
    let unmatched_multimodal = (0..multimodal.names.len())
        .filter(|&other| match_of[other].is_none())
        .map(|other| (other, models.reason_of_multimodal(&prefixes, other, &tails)))
        .collect();
    let pairs = match_of
        .iter()
        .enumerate()
        .filter_map(|(other, position)| position.map(|position| (position, other)))
        .collect();
    Ok(Alignment {
        layer_conflict: models.layer_conflict(&prefixes),
        prefixes,
        pairs,
        unmatched_reasoning,
        unmatched_multimodal,
        alternatives,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(names: &[(&str, &[usize])]) -> Vec<Named> {
        names.iter().map(|(n, s)| Named { name: (*n).to_owned(), shape: s.to_vec() }).collect()
    }

    fn decoder(prefix: &str, layers: usize, width: usize) -> Vec<Named> {
        let mut out = Vec::new();
        for layer in 0..layers {
            for (name, shape) in [
                ("self_attn.q_proj.weight", vec![width, width]),
                ("self_attn.o_proj.weight", vec![width, width]),
                ("mlp.up_proj.weight", vec![4 * width, width]),
                ("input_layernorm.weight", vec![width]),
            ] {
                out.push(Named { name: format!("{prefix}layers.{layer}.{name}"), shape });
            }
        }
        out.push(Named { name: format!("{prefix}norm.weight"), shape: vec![width] });
        out.push(Named { name: format!("{prefix}embed_tokens.weight"), shape: vec![100, width] });
        out
    }

    #[test]
    fn a_backbone_is_found_below_another_prefix_and_the_head_outside_it() {
        let mut text = decoder("model.", 3, 8);
        text.extend(named(&[("lm_head.weight", &[100, 8])]));
        let mut multimodal = named(&[("model.visual.blocks.0.attn.qkv.weight", &[24, 8])]);
        multimodal.extend(decoder("model.language_model.", 3, 8));
        multimodal.extend(named(&[("lm_head.weight", &[100, 8])]));
        let alignment = align(&text, &multimodal, Ties::Refuse).unwrap();
        assert_eq!(alignment.prefixes, ("model".to_owned(), "model.language_model".to_owned()));
        assert_eq!(alignment.pairs.len(), text.len());
        for &(source, name) in &alignment.pairs {
            let expected = text[source].name.replace("model.", "model.language_model.");
            assert_eq!(multimodal[name].name, expected);
        }
        assert_eq!(alignment.unmatched_multimodal.len(), 1);
        assert!(alignment.unmatched_multimodal[0].1.contains("outside the language backbone"));
    }

    #[test]
    fn a_vision_tower_of_the_same_width_does_not_capture_the_backbone() {
        let text = decoder("model.", 2, 8);
        let mut multimodal = Vec::new();
        for layer in 0..6 {
            let name = format!("vision_tower.encoder.layers.{layer}.self_attn.q_proj.weight");
            multimodal.push(Named { name, shape: vec![8, 8] });
        }
        multimodal.extend(decoder("language_model.model.", 2, 8));
        let alignment = align(&text, &multimodal, Ties::Refuse).unwrap();
        assert_eq!(alignment.prefixes, (String::new(), "language_model".to_owned()));
        assert_eq!(alignment.pairs.len(), text.len());
        assert_eq!(alignment.alternatives[0].2, 2);
    }

    #[test]
    fn two_language_models_are_refused_by_name() {
        let text = decoder("model.", 2, 8);
        let mut two = decoder("thinker.model.", 2, 8);
        two.extend(decoder("talker.model.", 2, 8));
        let error = align(&text, &two, Ties::Refuse).unwrap_err().to_string();
        assert!(error.contains("thinker") && error.contains("talker"), "{error}");
    }

    #[test]
    fn equal_names_decide_a_tie_only_where_that_is_asked_for() {
        let delta = decoder("talker.model.", 2, 8);
        let mut model = decoder("thinker.model.", 2, 8);
        model.extend(decoder("talker.model.", 2, 8));
        assert!(align(&delta, &model, Ties::Refuse).is_err());
        let alignment = align(&delta, &model, Ties::PreferEqualNames).unwrap();
        assert!(
            alignment.pairs.iter().all(|&(source, name)| delta[source].name == model[name].name)
        );
    }

    #[test]
    fn other_widths_and_depths_are_told_apart() {
        let error = align(&decoder("model.", 2, 8), &decoder("lm.", 2, 16), Ties::Refuse);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("[8, 8]") && error.contains("[16, 16]"), "{error}");
        let alignment =
            align(&decoder("model.", 2, 8), &decoder("lm.", 3, 8), Ties::Refuse).unwrap();
        assert!(alignment.layer_conflict.contains("2 in all"), "{}", alignment.layer_conflict);
        assert!(alignment.layer_conflict.contains("3 in all"), "{}", alignment.layer_conflict);
    }

    #[test]
    fn names_too_alike_to_be_matched_are_refused_by_their_limit() {
        let model = |letter: char| -> Vec<Named> {
            let name = |number| format!("{letter}{number}.x.weight");
            (0..3000).map(|number| Named { name: name(number), shape: vec![0] }).collect()
        };
        let error = align(&model('p'), &model('q'), Ties::Refuse).unwrap_err().to_string();
        assert!(error.contains("too alike") && error.contains("which is the limit"), "{error}");
    }

    #[test]
    fn aligning_ends_where_it_is_asked_to() {
        let model = decoder("model.", 2, 8);
        let stopped = interrupt::with_check(
            || std::ops::ControlFlow::Break(()),
            || {
                std::thread::sleep(std::time::Duration::from_millis(60));
                align(&model, &model, Ties::Refuse)
            },
        );
        assert!(matches!(stopped, Err(crate::Error::Interrupted)));
    }

    #[test]
    fn wrapped_names_align_as_if_unwrapped() {
        let plain = decoder("model.", 2, 8);
        let wrapped: Vec<Named> = plain
            .iter()
            .map(|t| Named {
                name: format!(
                    "_orig_mod.module.{}",
                    t.name.replace("mlp", "mlp._fsdp_wrapped_module")
                ),
                shape: t.shape.clone(),
            })
            .collect();
        let alignment = align(&plain, &wrapped, Ties::PreferEqualNames).unwrap();
        assert_eq!(alignment.pairs.len(), plain.len());
    }
}
