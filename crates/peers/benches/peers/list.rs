//! The cases of the bench.

use candle_core::DType::{self, BF16, F16, F32, F64};

use super::case::{Case, Op};

/// Shapes of one kind of layer: all of them in f32, a large and a small one in half precision, one
/// in f64.
struct Shapes {
    ops: &'static [Op],
    f32: &'static [&'static [usize]],
    half: [&'static [usize]; 2],
    f64: &'static [usize],
}

/// Every kind has a case of 64 MiB, which no cache holds: that is where time is a question of
/// memory traffic.
const SHAPES: [Shapes; 14] = [
    Shapes {
        ops: &[Op::LayerNorm, Op::RmsNorm],
        f32: &[
            &[1, 768],
            &[128, 768],
            &[4096, 768],
            &[512, 4096],
            &[16384, 1024],
            &[1024, 49],
            &[1024, 100],
        ],
        half: [&[4096, 768], &[128, 768]],
        f64: &[4096, 768],
    },
    Shapes {
        ops: &[Op::BatchNorm, Op::BatchNormInference],
        f32: &[
            &[32, 64, 56, 56],
            &[8, 256, 14, 14],
            &[8192, 256],
            &[64, 16, 8, 8],
            &[64, 64, 64, 64],
        ],
        half: [&[32, 64, 56, 56], &[64, 16, 8, 8]],
        f64: &[8, 256, 14, 14],
    },
    Shapes {
        ops: &[Op::GroupNorm],
        f32: &[
            &[8, 256, 32, 32],
            &[32, 64, 56, 56],
            &[2, 320, 64, 64],
            &[16, 256, 64, 64],
        ],
        half: [&[32, 64, 56, 56], &[8, 256, 32, 32]],
        f64: &[8, 256, 32, 32],
    },
    Shapes {
        ops: &[Op::InstanceNorm],
        f32: &[&[8, 64, 128, 128], &[16, 32, 32, 32], &[16, 64, 128, 128]],
        half: [&[8, 64, 128, 128], &[16, 32, 32, 32]],
        f64: &[16, 32, 32, 32],
    },
    Shapes {
        ops: &[Op::SwitchNorm],
        f32: &[&[32, 64, 56, 56], &[8, 256, 14, 14], &[64, 16, 8, 8]],
        half: [&[32, 64, 56, 56], &[64, 16, 8, 8]],
        f64: &[8, 256, 14, 14],
    },
    Shapes {
        ops: &[Op::WeightNorm],
        f32: &[&[1024, 1024], &[256, 256, 3, 3], &[4096, 4096]],
        half: [&[1024, 1024], &[256, 256, 3, 3]],
        f64: &[1024, 1024],
    },
    Shapes {
        ops: &[Op::ModulatedLayerNorm],
        f32: &[&[4, 1024, 768], &[16, 1024, 1024]],
        half: [&[4, 1024, 768], &[2, 64, 768]],
        f64: &[4, 1024, 768],
    },
    Shapes {
        ops: &[Op::LayerNormGelu, Op::GatedRmsNorm],
        f32: &[&[4096, 768], &[16384, 1024]],
        half: [&[4096, 768], &[128, 768]],
        f64: &[4096, 768],
    },
    Shapes {
        ops: &[Op::GroupNormSilu],
        f32: &[&[2, 320, 64, 64], &[16, 256, 64, 64]],
        half: [&[32, 64, 56, 56], &[8, 256, 32, 32]],
        f64: &[8, 256, 32, 32],
    },
    Shapes {
        ops: &[Op::MaskedBatchNorm],
        f32: &[&[16, 256, 512], &[64, 256, 1024]],
        half: [&[64, 256, 1024], &[16, 64, 128]],
        f64: &[16, 256, 512],
    },
    Shapes {
        ops: &[Op::GlobalResponseNorm],
        f32: &[&[16, 384, 14, 14], &[32, 64, 96, 96]],
        half: [&[16, 384, 14, 14], &[32, 64, 96, 96]],
        f64: &[16, 384, 14, 14],
    },
    Shapes {
        ops: &[Op::GatedResidual],
        f32: &[&[4096, 768], &[16384, 1024]],
        half: [&[4096, 768], &[128, 768]],
        f64: &[4096, 768],
    },
    Shapes {
        ops: &[Op::Softmax, Op::L2Normalize],
        f32: &[&[4096, 768], &[16384, 1024], &[1024, 49]],
        half: [&[4096, 768], &[128, 768]],
        f64: &[4096, 768],
    },
    Shapes {
        ops: &[Op::BatchNormRelu],
        f32: &[&[32, 64, 56, 56], &[64, 64, 64, 64]],
        half: [&[32, 64, 56, 56], &[64, 16, 8, 8]],
        f64: &[8, 256, 14, 14],
    },
];

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = vec![];
    for kind in &SHAPES {
        for &op in kind.ops {
            let mut push = |shape: &[usize], dtype: DType| cases.push(Case::new(op, shape, dtype));
            for shape in kind.f32 {
                push(shape, F32);
            }
            for shape in kind.half {
                push(shape, BF16);
                push(shape, F16);
            }
            push(kind.f64, F64);
        }
    }
    cases
}
