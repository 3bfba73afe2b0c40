//! Runs the kernels of rows on the emulator, and their formulas in f64.
#![allow(dead_code, unreachable_pub, unsafe_code)]
use candle_norm_cuda_emulator::{Args, Order, launch};
use candle_norm_cuda_kernels::geometry::rows::{self, Norm, ROUND_FIRST, Rows};
use candle_norm_cuda_kernels::{Element, Launch, Types};
use half::{bf16, f16};
use std::alloc::{Layout, alloc, dealloc};

/// An element of a buffer.
pub trait Elem: Copy + PartialEq + std::fmt::Debug + 'static {
    type Acc: Elem;
    const ELEMENT: Element;
    /// Half a unit in the last place of 1.
    const ROUNDING: f64;
    fn from_f64(v: f64) -> Self;
    fn to_f64(self) -> f64;
    fn bytes(self) -> Vec<u8>;
}

macro_rules! elem {
    ($t:ty, $acc:ty, $element:ident, $rounding:expr, $from:expr, $to:expr) => {
        impl Elem for $t {
            type Acc = $acc;
            const ELEMENT: Element = Element::$element;
            const ROUNDING: f64 = $rounding;
            fn from_f64(v: f64) -> Self {
                $from(v)
            }
            fn to_f64(self) -> f64 {
                $to(self)
            }
            fn bytes(self) -> Vec<u8> {
                self.to_le_bytes().to_vec()
            }
        }
    };
}
elem!(f32, f32, F32, 6e-8, |v| v as f32, f64::from);
elem!(f64, f64, F64, 1.2e-16, |v| v, |v| v);
elem!(
    f16,
    f32,
    F16,
    4.9e-4,
    |v: f64| f16::from_f32(v as f32),
    f64::from
);
elem!(
    bf16,
    f32,
    Bf16,
    4e-3,
    |v: f64| bf16::from_f32(v as f32),
    f64::from
);

/// Numbers in [-2, 2) that numpy makes as easily: 24 bits of a hash of the place.
pub fn numbers<T: Elem>(n: usize, seed: u32, mean: f64) -> Vec<T> {
    (0..n as u32)
        .map(|i| {
            let mut h = i.wrapping_add(seed.wrapping_mul(0x9e37_79b9));
            h = (h ^ (h >> 16)).wrapping_mul(0x7feb_352d);
            h = (h ^ (h >> 15)).wrapping_mul(0x846c_a68b);
            h ^= h >> 16;
            T::from_f64(f64::from(h >> 8) / f64::from(1 << 22) - 2. + mean)
        })
        .collect()
}

/// A buffer that begins `at` elements behind a multiple of 16 bytes and ends where its memory does.
pub struct Buffer<T> {
    /// At a multiple of 16 bytes; not to be read where `layout` is of no bytes.
    memory: *mut u8,
    layout: Layout,
    at: usize,
    len: usize,
    of: std::marker::PhantomData<T>,
}

impl<T: Elem> Buffer<T> {
    pub fn new(values: &[T], at: usize) -> Self {
        let mut buffer = Self::of_size(at, values.len());
        buffer.slice_mut().copy_from_slice(values);
        buffer
    }

    /// Filled with NaN.
    pub fn empty(len: usize) -> Self {
        Self::of_size(0, len)
    }

    fn of_size(at: usize, len: usize) -> Self {
        let layout = Layout::from_size_align((at + len) * size_of::<T>(), 16).unwrap();
        let memory = if layout.size() == 0 {
            std::ptr::without_provenance_mut(16)
        } else {
            // SAFETY: the layout has bytes. All of them are set to what is a NaN of every type.
            unsafe {
                let memory = alloc(layout);
                assert!(!memory.is_null());
                memory.write_bytes(0xff, layout.size());
                memory
            }
        };
        Self {
            memory,
            layout,
            at,
            len,
            of: std::marker::PhantomData,
        }
    }

    pub fn slice(&self) -> &[T] {
        // SAFETY: the memory holds `at + len` elements, for which all bits are valid.
        unsafe { std::slice::from_raw_parts(self.memory.cast::<T>().add(self.at), self.len) }
    }

    pub fn slice_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and the memory is borrowed as long.
        unsafe { std::slice::from_raw_parts_mut(self.memory.cast::<T>().add(self.at), self.len) }
    }

    pub fn to_f64(&self) -> Vec<f64> {
        self.slice().iter().map(|v| v.to_f64()).collect()
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        if self.layout.size() > 0 {
            // SAFETY: it was allocated with this layout.
            unsafe { dealloc(self.memory, self.layout) }
        }
    }
}

pub fn run(what: &Launch, args: Args<'_>, order: Order) {
    // SAFETY: the arguments are those that the geometry documents for the kernel.
    let done = unsafe {
        launch(
            &what.kernel,
            what.grid,
            what.block,
            what.shared,
            args,
            order,
        )
    };
    if let Err(fault) = done {
        panic!("{what:?}: {fault}");
    }
}

/// The inputs of a norm of rows.
pub struct Case<T: Elem, P: Elem> {
    pub shape: Rows,
    pub x: Buffer<T>,
    pub residual: Option<Buffer<T>>,
    pub weight: Option<Buffer<P>>,
    pub bias: Option<Buffer<P>>,
    pub dy: Buffer<T>,
    pub dsum: Option<Buffer<T>>,
    pub eps: f64,
    pub offset: f64,
    pub round_first: bool,
    /// See [`Options::few_blocks`].
    pub few_blocks: bool,
    /// See [`Options::samples`].
    pub samples: usize,
}

/// Options that vary beside the shape.
pub struct Options {
    pub mean: f64,
    pub weight: bool,
    pub bias: bool,
    pub dsum: bool,
    pub offset: f64,
    pub round_first: bool,
    /// Elements that the parameters begin behind a multiple of 16 bytes.
    pub at: usize,
    /// Fewer blocks than the geometry says: so that a team has several rows where a test has few.
    pub few_blocks: bool,
    /// Rows of weights and biases, each for as many rows.
    pub samples: usize,
}

pub const USUAL: Options = Options {
    mean: 0.25,
    weight: true,
    bias: true,
    dsum: true,
    offset: 0.,
    round_first: false,
    at: 0,
    few_blocks: false,
    samples: 1,
};

/// A case made of [`numbers`].
pub fn case<T: Elem, P: Elem>(norm: Norm, rows: usize, cols: usize, o: &Options) -> Case<T, P> {
    let types = Types::new(T::ELEMENT, P::ELEMENT).unwrap();
    let aligned = (o.at * size_of::<P>()).is_multiple_of(16);
    let n = rows * cols;
    let seed = (rows * 31 + cols) as u32;
    let buffer = |seed, mean| Buffer::new(&numbers::<T>(n, seed, mean), 0);
    let param = |seed, mean| Buffer::new(&numbers::<P>(o.samples * cols, seed, mean), o.at);
    Case {
        shape: Rows {
            norm,
            types,
            rows,
            cols,
            aligned,
        },
        x: buffer(seed, o.mean),
        residual: norm.add.then(|| buffer(seed + 1, 0.)),
        weight: o.weight.then(|| param(seed + 2, 0.5)),
        bias: o.bias.then(|| param(seed + 3, 0.)),
        dy: buffer(seed + 4, 0.1),
        dsum: (norm.add && o.dsum).then(|| buffer(seed + 5, 0.)),
        eps: 1e-5,
        offset: o.offset,
        round_first: o.round_first,
        few_blocks: o.few_blocks,
        samples: o.samples,
    }
}

/// The outputs.
pub struct Outputs<T: Elem, P: Elem> {
    pub y: Buffer<T>,
    pub sum: Buffer<T>,
    pub stats: Buffer<T::Acc>,
    pub dx: Buffer<T>,
    pub dweight: Buffer<P>,
    pub dbias: Buffer<P>,
}

impl<T: Elem, P: Elem> Outputs<T, P> {
    pub fn bytes(&self) -> Vec<u8> {
        fn all<E: Elem>(buffer: &Buffer<E>) -> impl Iterator<Item = u8> + '_ {
            buffer.slice().iter().flat_map(|v| v.bytes())
        }
        let parameters = all(&self.dweight).chain(all(&self.dbias));
        all(&self.y)
            .chain(all(&self.sum))
            .chain(all(&self.stats))
            .chain(all(&self.dx))
            .chain(parameters)
            .collect()
    }
}

fn maybe<E: Elem>(buffer: &Option<Buffer<E>>) -> Option<&[E]> {
    buffer.as_ref().map(Buffer::slice)
}

/// The outputs of a forward.
pub struct Forward<T: Elem> {
    pub y: Buffer<T>,
    pub sum: Buffer<T>,
    pub unrounded: Buffer<T::Acc>,
    pub stats: Buffer<T::Acc>,
}

/// The outputs of a backward, dx being of type X.
pub struct Backward<X: Elem, P: Elem> {
    pub dx: Buffer<X>,
    pub dweight: Buffer<P>,
    pub dbias: Buffer<P>,
}

impl<T: Elem, P: Elem> Case<T, P> {
    fn flags(&self) -> i32 {
        if self.round_first { ROUND_FIRST } else { 0 }
    }

    /// Blocks for each sample.
    fn few(&self, launch: &Launch) -> u32 {
        if launch.block[1] > 1 { 1 } else { 8 }
    }

    /// `y_len` is shorter than it must be where a test wants it so.
    pub fn forward(&self, order: Order, y_len: usize) -> Forward<T> {
        let Rows {
            norm, rows, cols, ..
        } = self.shape;
        let n = rows * cols;
        let of_sums = if norm.add { n } else { 0 };
        let mut y = Buffer::empty(y_len);
        let mut sum = Buffer::empty(of_sums);
        let mut unrounded = Buffer::empty(of_sums);
        let mut stats = Buffer::empty(norm.stats() * rows);
        let args = Args::new()
            .read(self.x.slice())
            .maybe_read(maybe(&self.residual))
            .maybe_read(maybe(&self.weight))
            .maybe_read(maybe(&self.bias))
            .write(y.slice_mut())
            .maybe_write(norm.add.then(|| sum.slice_mut()))
            .write(stats.slice_mut());
        let args = args.i64(rows as i64).i64(cols as i64);
        let mut args = args.f64(self.eps).f64(self.offset).i32(self.flags());
        if norm.add {
            args = args.write(unrounded.slice_mut());
        }
        let mut forward = self.shape.forward_by_sample(self.samples).unwrap();
        let fixed = forward.kernel.ends_with("b8") || forward.kernel.ends_with("long");
        if self.few_blocks && !fixed {
            forward.grid[0] = forward.grid[0].min(self.few(&forward));
        }
        run(&forward, args, order);
        Forward {
            y,
            sum,
            unrounded,
            stats,
        }
    }

    /// The launches of `plan`, x and dx being of type X.
    fn backward<X: Elem>(
        &self,
        mut plan: rows::Backward,
        x: &Buffer<X>,
        [residual, dsum]: [Option<&[T]>; 2],
        stats: &Buffer<T::Acc>,
        order: Order,
    ) -> Backward<X, P> {
        let Rows { rows, cols, .. } = self.shape;
        let flags = self.flags();
        if self.few_blocks {
            if let Some(columns) = &mut plan.columns {
                columns.grid[1] = columns.grid[1].min(8);
                plan.parts = columns.grid[1] as usize;
            } else {
                plan.dx.grid[0] = plan.dx.grid[0].min(self.few(&plan.dx));
                plan.parts = plan.dx.grid[0] as usize;
            }
        }
        let mut dx = Buffer::empty(rows * cols);
        let mut partial = Buffer::<T::Acc>::empty(self.samples * plan.parts * 2 * cols);
        let args = Args::new()
            .read(x.slice())
            .maybe_read(residual)
            .maybe_read(maybe(&self.weight))
            .read(self.dy.slice())
            .maybe_read(dsum)
            .read(stats.slice())
            .write(dx.slice_mut());
        if let Some(columns) = &plan.columns {
            let args = args.i64(rows as i64).i64(cols as i64).f64(self.offset);
            run(&plan.dx, args, order);
            let args = Args::new()
                .read(x.slice())
                .maybe_read(residual)
                .read(self.dy.slice())
                .read(stats.slice())
                .write(partial.slice_mut());
            run(
                columns,
                args.i64(rows as i64).i64(cols as i64).i32(flags),
                order,
            );
        } else {
            let args = args
                .write(partial.slice_mut())
                .i64(rows as i64)
                .i64(cols as i64);
            run(&plan.dx, args.f64(self.offset).i32(flags), order);
        }
        let [mut dweight, mut dbias] = [0; 2].map(|_| Buffer::empty(self.samples * cols));
        let args = Args::new()
            .read(partial.slice())
            .write(dweight.slice_mut())
            .write(dbias.slice_mut());
        run(
            &plan.finish,
            args.i64(plan.parts as i64).i64(cols as i64),
            order,
        );
        Backward { dx, dweight, dbias }
    }

    pub fn run(&self, order: Order) -> Outputs<T, P> {
        let Rows { rows, cols, .. } = self.shape;
        let Forward {
            y,
            sum,
            unrounded,
            stats,
        } = self.forward(order, rows * cols);
        for (sum, unrounded) in sum.slice().iter().zip(unrounded.slice()) {
            assert!(*sum == T::from_f64(unrounded.to_f64()), "{sum:?}");
        }
        let plan = self.shape.backward_by_sample(self.samples).unwrap();
        let added = [maybe(&self.residual), maybe(&self.dsum)];
        let Backward { dx, dweight, dbias } = self.backward(plan, &self.x, added, &stats, order);
        Outputs {
            y,
            sum,
            stats,
            dx,
            dweight,
            dbias,
        }
    }

    /// The backward from the unrounded sum that the forward wrote, and that sum.
    pub fn run_of_sum(&self, order: Order) -> (Buffer<T::Acc>, Backward<T::Acc, P>) {
        let Rows { rows, cols, .. } = self.shape;
        let forward = self.forward(order, rows * cols);
        let plan = self.shape.backward_of_sum().unwrap();
        let (sum, stats) = (forward.unrounded, forward.stats);
        let backward = self.backward(plan, &sum, [None, None], &stats, order);
        (sum, backward)
    }
}
