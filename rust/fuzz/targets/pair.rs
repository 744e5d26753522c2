//! Two files: their names are aligned, each tensor of either at most once and with its own shape, and
//! the differences of float32 tensors are those of the bytes that the official reader reads.
#![no_main]

use std::collections::BTreeSet;
use std::ops::ControlFlow;

use drift_fast_core::align::pair::{Pair, Source};
use drift_fast_core::align::{Named, Ties, align};
use drift_fast_core::checkpoint::Operand;
use drift_fast_core::stream::{Detail, Difference, Landed, Memory, Options, load_differences};
use drift_fast_core::{Checkpoint, Dtype};
use drift_fast_fuzz::{Read, file, official, open};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let at = bytes.iter().position(|&byte| byte == 0xFF).unwrap_or(bytes.len());
    let files = [file(&bytes[..at]), file(bytes.get(at + 1..).unwrap_or_default())];
    let expected = [official(&files[0]), official(&files[1])];
    let [first, second] = files;
    let names = ["a.safetensors", "b.safetensors"];
    let (directory, reasoning) = open([(names[0], first), (names[1], second)], names[0]);
    let multimodal = Checkpoint::open(&directory.join(names[1]), Default::default());
    let (Ok(reasoning), Ok(multimodal)) = (reasoning, multimodal) else { return };
    let [Some(left), Some(right)] = expected else { panic!("both are valid") };
    let named = |checkpoint: &Checkpoint| -> Vec<Named> {
        let tensors = checkpoint.tensors();
        tensors.map(|(_, one)| Named { name: one.name.clone(), shape: one.shape.clone() }).collect()
    };
    let sides = [named(&reasoning), named(&multimodal)];
    let Ok(found) = align(&sides[0], &sides[1], Ties::Refuse) else { return };
    let mut seen = (BTreeSet::new(), BTreeSet::new());
    for (source, name) in found.pairs {
        assert!(seen.0.insert(source) && seen.1.insert(name), "matched twice");
        let (source, name) = (&sides[0][source], &sides[1][name]);
        assert_eq!(source.shape, name.shape);
        subtract((&reasoning, &source.name), (&multimodal, &name.name), (&left, &right));
    }
});

fn subtract(
    (reasoning, source): (&Checkpoint, &str),
    (multimodal, name): (&Checkpoint, &str),
    (left, right): (&Read, &Read),
) {
    let ((kind, _, a), (other, _, b)) = (&left[source], &right[name]);
    if kind != "F32" || other != "F32" || a.len() > 1 << 16 {
        return;
    }
    let pair = Pair {
        reasoning: Source::Whole(operand(reasoning, source)),
        multimodal: operand(multimodal, name),
    };
    let mut out = vec![0; b.len()];
    let wanted = [Difference { elements: 0..pair.multimodal.tensor.numel(), pair }];
    let memory = Memory::Each(vec![&mut out]);
    let landed: Landed<'_> = &mut |_| ControlFlow::Continue(0);
    load_differences(&wanted, Dtype::F32, memory, &Options::new(1), Detail::Faults, landed)
        .expect("a difference");
    let values = |bytes: &[u8]| -> Vec<f32> {
        bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    };
    for ((a, b), found) in values(a).iter().zip(values(b)).zip(values(&out)) {
        let expected = a - b;
        assert!(expected.to_bits() == found.to_bits() || expected.is_nan() && found.is_nan());
    }
}

fn operand<'a>(checkpoint: &'a Checkpoint, name: &str) -> Operand<'a> {
    let (shard, tensor) = checkpoint.tensor(name).expect("it was listed");
    Operand { shard, tensor, scales: None }
}
