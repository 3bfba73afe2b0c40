//! CUDA kernels of normalization layers, as sources and PTX, and the geometry of their launches.
//!
//! This crate knows no tensor library. A launch is a [`Launch`]: a kernel's name, a grid, a block
//! and shared memory, all pure functions of the shape (see [`geometry`]). Every kernel's arguments
//! stand where its launch is made.
pub mod geometry;
#[cfg(feature = "ptx")]
pub mod ptx;

/// One launch of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The kernel's name.
    pub kernel: String,
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block along x, y and z.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

/// A type of elements. Sums and products of f16 and bf16 are taken in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// `float`
    F32,
    /// Half precision of IEEE 754.
    F16,
    /// The upper half of a `float`.
    Bf16,
    /// `double`
    F64,
}

impl Element {
    /// As in the names of kernels.
    pub fn name(self) -> &'static str {
        match self {
            Element::F32 => "f32",
            Element::F16 => "f16",
            Element::Bf16 => "bf16",
            Element::F64 => "f64",
        }
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::F16 | Element::Bf16 => 2,
            Element::F64 => 8,
        }
    }

    /// The type of statistics, scratch and sums: f64 for f64, else f32.
    pub fn accumulator(self) -> Element {
        if self == Element::F64 {
            Element::F64
        } else {
            Element::F32
        }
    }

    /// Elements in 16 bytes.
    pub fn lanes(self) -> usize {
        16 / self.size()
    }
}

/// The types of x and of its parameters: the same, or half precision with f32 parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Types {
    x: Element,
    param: Element,
}

impl Types {
    /// All that there are kernels for.
    pub const ALL: [Types; 6] = [
        Types {
            x: Element::F32,
            param: Element::F32,
        },
        Types {
            x: Element::F16,
            param: Element::F16,
        },
        Types {
            x: Element::Bf16,
            param: Element::Bf16,
        },
        Types {
            x: Element::F16,
            param: Element::F32,
        },
        Types {
            x: Element::Bf16,
            param: Element::F32,
        },
        Types {
            x: Element::F64,
            param: Element::F64,
        },
    ];

    /// These types, if there are kernels for them.
    pub fn new(x: Element, param: Element) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|types| types.x == x && types.param == param)
    }

    /// The type of x.
    pub fn x(self) -> Element {
        self.x
    }

    /// The type of the parameters.
    pub fn param(self) -> Element {
        self.param
    }

    /// As in the names of kernels and of PTX modules: `bf16_f32`.
    pub fn name(self) -> &'static str {
        match (self.x, self.param) {
            (Element::F32, _) => "f32_f32",
            (Element::F16, Element::F16) => "f16_f16",
            (Element::Bf16, Element::Bf16) => "bf16_bf16",
            (Element::F16, _) => "f16_f32",
            (Element::Bf16, _) => "bf16_f32",
            (Element::F64, _) => "f64_f64",
        }
    }
}
