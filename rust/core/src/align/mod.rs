//! Which tensor of one model is which of the other, by names and shapes alone.
//!
//! There is no table of model families. Names are cut into a prefix and a suffix in every way that
//! keeps two components of suffix; the pair of prefixes that makes most (suffix, shape) equal wins.
//! What is left over, a head outside the backbone say, is placed by its last two components where
//! that is unambiguous. A second pair of prefixes that would explain every layer parameter as well
//! is a conflict and refused; so nothing here guesses between two language models.

pub mod compose;
pub mod pair;
pub mod similarity;

use std::collections::{BTreeMap, BTreeSet, HashMap};

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

/// A pairing of the tensors of two models, `a` and `b`.
#[derive(Debug, Clone)]
pub struct Alignment {
    /// What the names of `a` begin with, and those of `b` in its place.
    pub prefixes: (String, String),
    /// Index into `a` and index into `b`, in the order of `b`.
    pub pairs: Vec<(usize, usize)>,
    /// Index into `a`, and why it has no partner.
    pub unmatched_a: Vec<(usize, String)>,
    /// Index into `b`, and why it has no partner.
    pub unmatched_b: Vec<(usize, String)>,
    /// Layer counts that differ, as a sentence; empty where they agree.
    pub layer_conflict: String,
    /// Other prefix pairs that match some of the same tensors, with how many, most first.
    pub rivals: Vec<(String, String, usize)>,
}

/// Which side of a tie may be decided by equal names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ties {
    /// Two pairs of prefixes that explain everything are an error.
    Refuse,
    /// Equal prefixes win, as where a model's own names are looked up in it.
    PreferEqualNames,
}

/// Pair the tensors of `a` with those of `b`.
///
/// # Errors
/// Nothing matches, two names become one when wrappers are stripped, or two different pairings
/// explain every layer parameter of `a`.
pub fn align(a: &[Named], b: &[Named], ties: Ties) -> Result<Alignment> {
    let (left, right) = (Side::new(a)?, Side::new(b)?);
    let by_shape = count_prefixes(&left, &right, true);
    let by_name = count_prefixes(&left, &right, false);
    let Some(best) = best(&by_shape) else { return Err(nothing_matches(&left, &right, &by_name)) };
    // Where shapes differ nearly everywhere, the few that agree by chance must not pick the prefix.
    let named = self::best(&by_name).unwrap_or_else(|| best.clone());
    let chosen = if by_name[&named] >= 2 * by_shape[&best] { named } else { best };

    let mut rivals: Vec<_> = by_shape
        .iter()
        .filter(|(prefixes, _)| !same_mapping(prefixes, &chosen))
        .map(|(prefixes, &count)| (prefixes.clone(), count))
        .collect();
    rivals.sort_by(|x, y| y.1.cmp(&x.1).then_with(|| x.0.cmp(&y.0)));
    refuse_ambiguity(&left, &right, &chosen, &rivals, ties)?;

    let mut alignment = pair_up(&left, &right, &chosen);
    alignment.rivals = distinct_rivals(rivals);
    Ok(alignment)
}

type Prefixes = (String, String);

struct Side<'a> {
    tensors: &'a [Named],
    names: Vec<String>,
    index: HashMap<String, usize>,
}

impl<'a> Side<'a> {
    fn new(tensors: &'a [Named]) -> Result<Self> {
        let names: Vec<String> = tensors.iter().map(|tensor| unwrapped(&tensor.name)).collect();
        let mut index = HashMap::with_capacity(names.len());
        for (position, name) in names.iter().enumerate() {
            if let Some(other) = index.insert(name.clone(), position) {
                return Err(Error::Alignment(format!(
                    "{:?} and {:?} are the same name once wrappers are stripped",
                    tensors[other].name, tensors[position].name
                )));
            }
        }
        Ok(Self { tensors, names, index })
    }

    fn shape(&self, position: usize) -> &[usize] {
        &self.tensors[position].shape
    }

    /// Positions of the parameters that belong to a numbered layer.
    fn layer_positions(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.names.len()).filter(|&position| in_layer(&self.names[position]))
    }
}

fn unwrapped(name: &str) -> String {
    name.split('.').filter(|part| !WRAPPERS.contains(part)).collect::<Vec<_>>().join(".")
}

fn is_number(component: &str) -> bool {
    !component.is_empty() && component.bytes().all(|byte| byte.is_ascii_digit())
}

fn in_layer(name: &str) -> bool {
    name.split('.').any(is_number)
}

fn join(prefix: &str, suffix: &str) -> String {
    if prefix.is_empty() { suffix.to_owned() } else { format!("{prefix}.{suffix}") }
}

fn suffix_after<'n>(name: &'n str, prefix: &str) -> Option<&'n str> {
    if prefix.is_empty() { Some(name) } else { name.strip_prefix(prefix)?.strip_prefix('.') }
}

/// Every way to cut a name; a prefix holds no layer number, so that layers cannot shift.
fn cuts(name: &str) -> impl Iterator<Item = (&str, &str)> {
    let dots: Vec<usize> = name.match_indices('.').map(|(at, _)| at).collect();
    let last = dots.len().saturating_sub(1);
    std::iter::once(("", name)).chain(
        dots.into_iter()
            .take(last)
            .map(move |at| (&name[..at], &name[at + 1..]))
            .take_while(|(prefix, _)| !in_layer(prefix)),
    )
}

fn count_prefixes(left: &Side<'_>, right: &Side<'_>, shapes: bool) -> BTreeMap<Prefixes, usize> {
    let no_shape: &[usize] = &[];
    let shape = |side: &Side<'_>, position: usize| -> Vec<usize> {
        if shapes { side.shape(position).to_vec() } else { no_shape.to_vec() }
    };
    let mut by_suffix: HashMap<(&str, Vec<usize>), Vec<&str>> = HashMap::new();
    for (position, name) in right.names.iter().enumerate() {
        for (prefix, suffix) in cuts(name) {
            by_suffix.entry((suffix, shape(right, position))).or_default().push(prefix);
        }
    }
    let mut counts: HashMap<(&str, &str), usize> = HashMap::new();
    for (position, name) in left.names.iter().enumerate() {
        let shape = shape(left, position);
        for (prefix, suffix) in cuts(name) {
            for other in by_suffix.get(&(suffix, shape.clone())).into_iter().flatten() {
                *counts.entry((prefix, other)).or_default() += 1;
            }
        }
    }
    counts.into_iter().map(|((a, b), n)| ((a.to_owned(), b.to_owned()), n)).collect()
}

/// Most matches; among equals the shortest prefixes, which reach furthest.
fn best(counts: &BTreeMap<Prefixes, usize>) -> Option<Prefixes> {
    counts
        .iter()
        .max_by(|(p, n), (q, m)| {
            n.cmp(m).then_with(|| (q.0.len() + q.1.len()).cmp(&(p.0.len() + p.1.len())))
        })
        .map(|(prefixes, _)| prefixes.clone())
}

/// Whether two prefix pairs send every name they share to the same place.
fn same_mapping(x: &Prefixes, y: &Prefixes) -> bool {
    let extends = |long: &Prefixes, short: &Prefixes| {
        let tail = |long: &str, short: &str| -> Option<String> {
            if long == short {
                return Some(String::new());
            }
            suffix_after(long, short).map(str::to_owned)
        };
        match (tail(&long.0, &short.0), tail(&long.1, &short.1)) {
            (Some(a), Some(b)) => a == b,
            _ => false,
        }
    };
    extends(x, y) || extends(y, x)
}

/// Whether a prefix pair gives every layer parameter of `left` a partner of its shape.
fn explains_every_layer(left: &Side<'_>, right: &Side<'_>, prefixes: &Prefixes) -> bool {
    let mut any = false;
    left.layer_positions().all(|position| {
        any = true;
        partner(left, right, prefixes, position)
            .is_some_and(|other| left.shape(position) == right.shape(other))
    }) && any
}

fn partner(
    left: &Side<'_>,
    right: &Side<'_>,
    prefixes: &Prefixes,
    position: usize,
) -> Option<usize> {
    let suffix = suffix_after(&left.names[position], &prefixes.0)?;
    right.index.get(&join(&prefixes.1, suffix)).copied()
}

fn refuse_ambiguity(
    left: &Side<'_>,
    right: &Side<'_>,
    chosen: &Prefixes,
    rivals: &[(Prefixes, usize)],
    ties: Ties,
) -> Result<()> {
    if ties == Ties::PreferEqualNames && chosen.0 == chosen.1 {
        return Ok(());
    }
    let complete = explains_every_layer(left, right, chosen);
    let matched = left
        .layer_positions()
        .filter(|&position| {
            partner(left, right, chosen, position)
                .is_some_and(|other| left.shape(position) == right.shape(other))
        })
        .count();
    let chosen_modules = modules(left, right, chosen);
    for (rival, count) in rivals {
        // A rival that leaves layer parameters without a partner (a vision tower whose query
        // projections happen to fit) cannot be the language model, if the chosen pair leaves none.
        // Where neither explains all of it, a tower gives itself away by what it lacks: gates, say.
        let conflict = if complete {
            explains_every_layer(left, right, rival)
        } else {
            matched > 0
                && 2 * count >= matched
                && 4 * modules(left, right, rival) >= 3 * chosen_modules
        };
        if conflict {
            let example = |prefixes: &Prefixes| {
                left.layer_positions()
                    .find_map(|at| partner(left, right, prefixes, at))
                    .map_or("", |at| &right.tensors[at].name)
            };
            let first =
                left.layer_positions().find(|&at| partner(left, right, rival, at).is_some());
            return Err(Error::Alignment(format!(
                "two pairings fit: {} could be {} or {} (of the second kind there are {count}); \
                 there is no telling which is meant, so neither is taken. Save the language model \
                 that is meant as a checkpoint of its own and align with that",
                first.map_or("", |at| &left.tensors[at].name),
                example(chosen),
                example(rival),
            )));
        }
    }
    Ok(())
}

/// How many modules of a layer a prefix pair gives a partner of their shape in any layer.
fn modules(left: &Side<'_>, right: &Side<'_>, prefixes: &Prefixes) -> usize {
    left.layer_positions()
        .filter(|&position| {
            partner(left, right, prefixes, position)
                .is_some_and(|other| left.shape(position) == right.shape(other))
        })
        .map(|position| {
            let parts: Vec<&str> = left.names[position].split('.').collect();
            let layer = parts.iter().position(|part| is_number(part)).unwrap_or_default();
            parts[layer..].iter().skip(1).copied().collect::<Vec<_>>().join(".")
        })
        .collect::<BTreeSet<_>>()
        .len()
}

fn distinct_rivals(rivals: Vec<(Prefixes, usize)>) -> Vec<(String, String, usize)> {
    let mut kept: Vec<(Prefixes, usize)> = Vec::new();
    for (prefixes, count) in rivals {
        if !kept.iter().any(|(other, _)| same_mapping(&prefixes, other)) {
            kept.push((prefixes, count));
        }
        if kept.len() == 3 {
            break;
        }
    }
    kept.into_iter().map(|((a, b), count)| (a, b, count)).collect()
}

fn pair_up(left: &Side<'_>, right: &Side<'_>, prefixes: &Prefixes) -> Alignment {
    let mut partner_of: Vec<Option<usize>> = vec![None; right.names.len()];
    let mut unmatched_a = Vec::new();
    let mut leftover = Vec::new();
    for position in 0..left.names.len() {
        match partner(left, right, prefixes, position) {
            Some(other) if left.shape(position) == right.shape(other) => {
                partner_of[other] = Some(position);
            }
            _ => leftover.push(position),
        }
    }
    for position in leftover {
        match place_leftover(left, right, prefixes, position, &partner_of) {
            Ok(other) => partner_of[other] = Some(position),
            Err(reason) => unmatched_a.push((position, reason)),
        }
    }
    let unmatched_b = (0..right.names.len())
        .filter(|&other| partner_of[other].is_none())
        .map(|other| (other, reason_b(left, right, prefixes, other)))
        .collect();
    let pairs = partner_of
        .iter()
        .enumerate()
        .filter_map(|(other, position)| position.map(|position| (position, other)))
        .collect();
    Alignment {
        prefixes: prefixes.clone(),
        pairs,
        unmatched_a,
        unmatched_b,
        layer_conflict: layer_conflict(left, right, prefixes),
        rivals: Vec::new(),
    }
}

/// Place a tensor outside the layers by its last two components, or say why it has no partner.
fn place_leftover(
    left: &Side<'_>,
    right: &Side<'_>,
    prefixes: &Prefixes,
    position: usize,
    partner_of: &[Option<usize>],
) -> std::result::Result<usize, String> {
    if let Some(other) = partner(left, right, prefixes, position) {
        return Err(format!(
            "shape {:?} differs from {:?} of {}",
            left.shape(position),
            right.shape(other),
            right.tensors[other].name
        ));
    }
    let name = &left.names[position];
    if in_layer(name) {
        return Err(match suffix_after(name, &prefixes.0) {
            Some(suffix) => format!("the other model has no {}", join(&prefixes.1, suffix)),
            None => format!("outside the aligned prefix {:?}", prefixes.0),
        });
    }
    let candidates: Vec<usize> = (0..right.names.len())
        .filter(|&other| partner_of[other].is_none() && !in_layer(&right.names[other]))
        .filter(|&other| tail(&right.names[other]) == tail(name))
        .collect();
    let fitting: Vec<usize> = candidates
        .iter()
        .copied()
        .filter(|&other| left.shape(position) == right.shape(other))
        .collect();
    match (&fitting[..], &candidates[..]) {
        (&[only], _) => Ok(only),
        ([], []) => Err("the other model has no tensor of that name".to_owned()),
        ([], &[other, ..]) => Err(format!(
            "shape {:?} differs from {:?} of {}",
            left.shape(position),
            right.shape(other),
            right.tensors[other].name
        )),
        (&[one, two, ..], _) => {
            Err(format!("fits both {} and {}", right.tensors[one].name, right.tensors[two].name))
        }
    }
}

fn reason_b(left: &Side<'_>, right: &Side<'_>, prefixes: &Prefixes, other: usize) -> String {
    let name = &right.names[other];
    match suffix_after(name, &prefixes.1) {
        Some(suffix) => match left.index.get(&join(&prefixes.0, suffix)) {
            Some(&position) => format!(
                "shape {:?} differs from {:?} of {}",
                right.shape(other),
                left.shape(position),
                left.tensors[position].name
            ),
            None => format!("the other model has no {}", join(&prefixes.0, suffix)),
        },
        None => {
            // A head lies outside the prefix and may still have a counterpart of another shape.
            let other_shape = (0..left.names.len()).find(|&position| {
                !in_layer(name)
                    && !in_layer(&left.names[position])
                    && tail(name) == tail(&left.names[position])
                    && left.shape(position) != right.shape(other)
            });
            match other_shape {
                Some(position) => format!(
                    "shape {:?} differs from {:?} of {}",
                    right.shape(other),
                    left.shape(position),
                    left.tensors[position].name
                ),
                None => format!("outside the language backbone {:?}", prefixes.1),
            }
        }
    }
}

/// The last two components of a name.
fn tail(name: &str) -> Vec<&str> {
    name.rsplitn(3, '.').take(2).collect()
}

/// The layer numbers under each numbered container that both sides have.
fn layer_conflict(left: &Side<'_>, right: &Side<'_>, prefixes: &Prefixes) -> String {
    let containers = |side: &Side<'_>, prefix: &str| {
        let mut layers: BTreeMap<String, BTreeSet<u64>> = BTreeMap::new();
        for suffix in side.names.iter().filter_map(|name| suffix_after(name, prefix)) {
            let parts: Vec<&str> = suffix.split('.').collect();
            if let Some(at) = parts.iter().position(|part| is_number(part))
                && let Ok(layer) = parts[at].parse()
            {
                layers.entry(parts[..at].join(".")).or_default().insert(layer);
            }
        }
        layers
    };
    let (a, b) = (containers(left, &prefixes.0), containers(right, &prefixes.1));
    for (container, layers) in &a {
        if let Some(others) = b.get(container)
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

fn spans(layers: &BTreeSet<u64>) -> String {
    let (first, last) = (layers.first().copied(), layers.last().copied());
    match (first, last) {
        (Some(first), Some(last)) => format!("{first} to {last} ({} in all)", layers.len()),
        _ => "none".to_owned(),
    }
}

fn nothing_matches(
    left: &Side<'_>,
    right: &Side<'_>,
    by_name: &BTreeMap<Prefixes, usize>,
) -> Error {
    let Some(prefixes) = best(by_name) else {
        let example = |side: &Side<'_>| side.tensors.first().map_or("", |t| &t.name).to_owned();
        return Error::Alignment(format!(
            "no tensor of one model matches one of the other: names such as {:?} and {:?} share no \
             ending. Are these two models of the same architecture?",
            example(left),
            example(right)
        ));
    };
    let examples: Vec<String> = (0..left.names.len())
        .filter_map(|position| Some((position, partner(left, right, &prefixes, position)?)))
        .take(3)
        .map(|(position, other)| {
            format!(
                "{} {:?} and {} {:?}",
                left.tensors[position].name,
                left.shape(position),
                right.tensors[other].name,
                right.shape(other)
            )
        })
        .collect();
    Error::Alignment(format!(
        "{} names match under {:?} → {:?} but every shape differs: {}. The two models have different \
         sizes; choose a reasoning model of the same backbone",
        by_name[&prefixes],
        prefixes.0,
        prefixes.1,
        examples.join("; ")
    ))
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
        for &(a, b) in &alignment.pairs {
            let expected = text[a].name.replace("model.", "model.language_model.");
            assert_eq!(multimodal[b].name, expected);
        }
        assert_eq!(alignment.unmatched_b.len(), 1);
        assert!(alignment.unmatched_b[0].1.contains("outside the language backbone"));
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
        assert_eq!(alignment.rivals[0].2, 2);
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
        assert!(alignment.pairs.iter().all(|&(a, b)| delta[a].name == model[b].name));
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
