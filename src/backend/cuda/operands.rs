//! Arguments of launches: which storages they may be, and what is converted before.

use candle_core::backend::BackendStorage;
use candle_core::op::Sub;
use candle_core::scalar::Scalar;
use candle_core::{DType, Layout, Result, Tensor};
use candle_norm_cuda_kernels::geometry::rows::ALIGNMENT;
use candle_norm_cuda_kernels::{Element, Launch, Types};

use super::asked::count;
use super::{Arg, Launcher, View};
use crate::backend::DeviceStorage;
use crate::computations::composed::accumulator;
use candle_norm_support::messages;

/// The device that a layer computes on.
pub(super) struct Device<'a, L: Launcher> {
    layer: &'static str,
    /// A storage on it.
    like: &'a L::Storage,
}

impl<L: Launcher> Clone for Device<'_, L> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<L: Launcher> Copy for Device<'_, L> {}

/// Elements that kernels read: some of candle's, or a copy of them.
pub(super) struct Operand<'a, S> {
    storage: Held<'a, S>,
    start: usize,
    len: usize,
}

enum Held<'a, S> {
    Borrowed(&'a S),
    Owned(S),
}

impl<'a, S: BackendStorage> Operand<'a, S> {
    /// All of the `len` elements of a storage of its own.
    pub(super) fn whole(storage: S, len: usize) -> Self {
        Self {
            storage: Held::Owned(storage),
            start: 0,
            len,
        }
    }

    /// All of the `len` elements of a storage.
    pub(super) fn all(storage: &'a S, len: usize) -> Self {
        Self {
            storage: Held::Borrowed(storage),
            start: 0,
            len,
        }
    }

    /// The elements of a storage from one of them on; the kernel knows how many.
    pub(super) fn from(storage: &'a S, start: usize) -> Self {
        Self {
            storage: Held::Borrowed(storage),
            start,
            len: 0,
        }
    }

    /// The same elements.
    pub(super) fn borrowed(&self) -> Operand<'_, S> {
        Operand {
            storage: Held::Borrowed(self.storage()),
            start: self.start,
            len: self.len,
        }
    }

    fn storage(&self) -> &S {
        match &self.storage {
            Held::Borrowed(storage) => storage,
            Held::Owned(storage) => storage,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn dtype(&self) -> DType {
        self.storage().dtype()
    }

    fn layout(&self) -> Layout {
        Layout::contiguous_with_offset(self.len, self.start)
    }

    /// Whether the first element lies at a multiple of [`ALIGNMENT`] bytes. Memory of a device
    /// begins at one.
    pub(super) fn is_aligned(&self) -> bool {
        (self.start * self.dtype().size_in_bytes()).is_multiple_of(ALIGNMENT)
    }
}

impl<'a, L: Launcher> Device<'a, L> {
    /// The device of a storage.
    pub(super) fn of(layer: &'static str, like: &'a L::Storage) -> Self {
        Self { layer, like }
    }

    pub(super) fn layer(self) -> &'static str {
        self.layer
    }

    /// `len` elements for a kernel to write.
    pub(super) fn alloc(self, dtype: DType, len: usize) -> Result<L::Storage> {
        count(|asked| asked.allocations += 1);
        L::alloc(self.like, dtype, len.max(1))
    }

    /// `len` times the same number.
    pub(super) fn filled(self, value: Scalar, len: usize) -> Result<L::Storage> {
        let mut storage = self.alloc(value.dtype(), len)?;
        storage.const_set(value, &Layout::contiguous(len))?;
        Ok(storage)
    }

    /// `len` zeros.
    pub(super) fn zeros(self, dtype: DType, len: usize) -> Result<Operand<'a, L::Storage>> {
        let zeros = self.filled(Scalar::zero(dtype), len)?;
        Ok(Operand::whole(zeros, len))
    }

    /// The elements of a tensor that fills its part of the storage, in whatever order, where
    /// vectors can be read.
    pub(super) fn input<'b>(self, x: View<'b, L::Storage>) -> Result<Operand<'b, L::Storage>> {
        let operand = Operand {
            storage: Held::Borrowed(x.storage),
            start: x.layout.start_offset(),
            len: x.layout.shape().elem_count(),
        };
        if operand.is_aligned() {
            return Ok(operand);
        }
        Ok(Operand::whole(self.copied(&operand)?, operand.len))
    }

    /// The elements of a contiguous tensor in `dtype`.
    pub(super) fn param<'b>(
        self,
        param: View<'b, L::Storage>,
        dtype: DType,
    ) -> Result<Operand<'b, L::Storage>> {
        let Some((start, end)) = param.layout.contiguous_offsets() else {
            return messages::internal(self.layer, "a contiguous tensor");
        };
        let len = end - start;
        if param.storage.dtype() == dtype {
            return Ok(Operand {
                storage: Held::Borrowed(param.storage),
                start,
                len,
            });
        }
        let converted = cast(param.storage, param.layout, dtype)?;
        Ok(Operand::whole(converted, len))
    }

    /// [`param`](Self::param), of one that there may be.
    pub(super) fn maybe_param<'b>(
        self,
        param: Option<View<'b, L::Storage>>,
        dtype: DType,
    ) -> Result<Option<Operand<'b, L::Storage>>> {
        param.map(|param| self.param(param, dtype)).transpose()
    }

    /// The types of kernels for `x` and its parameters: of their own dtype where all have the same
    /// as `x`, else of the accumulator's.
    pub(super) fn types<'b>(
        self,
        x: DType,
        params: impl IntoIterator<Item = Option<View<'b, L::Storage>>>,
    ) -> Result<Types> {
        let mut params = params.into_iter().flatten().peekable();
        let is_own = params.peek().is_some() && params.all(|param| param.storage.dtype() == x);
        let of_params = if is_own { x } else { accumulator(x) };
        match Types::new(self.element(x)?, self.element(of_params)?) {
            Some(types) => Ok(types),
            None => messages::internal(self.layer, "dtypes that kernels know"),
        }
    }

    pub(super) fn element(self, dtype: DType) -> Result<Element> {
        Ok(match dtype {
            DType::F32 => Element::F32,
            DType::F16 => Element::F16,
            DType::BF16 => Element::Bf16,
            DType::F64 => Element::F64,
            _ => messages::internal(self.layer, "a dtype that kernels know")?,
        })
    }

    /// A copy of an operand.
    pub(super) fn copied(self, operand: &Operand<L::Storage>) -> Result<L::Storage> {
        let mut copy = self.alloc(operand.dtype(), operand.len)?;
        self.copy_into(operand, &mut copy, 0)?;
        Ok(copy)
    }

    /// Copies an operand to elements from `at` on.
    pub(super) fn copy_into(
        self,
        operand: &Operand<L::Storage>,
        to: &mut L::Storage,
        at: usize,
    ) -> Result<()> {
        copied(operand.storage(), &operand.layout(), to, at)
    }

    /// A launch of a shape that kernels know: inputs are not empty.
    pub(super) fn launch<T>(self, launch: Option<T>) -> Result<T> {
        match launch {
            Some(launch) => Ok(launch),
            None => messages::internal(self.layer, "a shape within the limits of a grid"),
        }
    }

    /// A launch, whose arguments follow.
    pub(super) fn call<'b>(self, launch: &'b Launch) -> Call<'b, L>
    where
        'a: 'b,
    {
        Call {
            device: self,
            launch,
            args: vec![],
        }
    }
}

/// Numbers of `f64` in the dtype that kernels compute in.
pub(crate) struct Pair<S> {
    pub(super) high: S,
    /// The rounding errors, if there are any.
    pub(super) low: Option<S>,
}

impl<S: BackendStorage> Pair<S> {
    /// Of numbers that are not rounded.
    pub(super) fn exact(high: S) -> Self {
        Self { high, low: None }
    }

    /// Of `len` numbers in `f64`.
    pub(super) fn of(wide: &S, len: usize, dtype: DType) -> Result<Self> {
        let line = Layout::contiguous(len);
        let high = cast(wide, &line, dtype)?;
        let low = || {
            let rounded = cast(&high, &line, DType::F64)?;
            let low = wide.binary_impl::<Sub>(&rounded, &line, &line)?;
            cast(&low, &line, dtype)
        };
        let low = (dtype != DType::F64).then(low).transpose()?;
        Ok(Self { high, low })
    }
}

/// Elements in `dtype`, in storage of their own on the device.
pub(super) fn cast<S: BackendStorage>(from: &S, layout: &Layout, dtype: DType) -> Result<S> {
    count(|asked| asked.copies += 1);
    from.to_dtype(layout, dtype)
}

/// Copies elements on the device to those of `to` from the one at `at` on.
pub(super) fn copied<S: BackendStorage>(
    from: &S,
    layout: &Layout,
    to: &mut S,
    at: usize,
) -> Result<()> {
    count(|asked| asked.copies += 1);
    from.copy_strided_src(to, at, layout)
}

/// The dtype of elements.
pub(super) fn dtype(element: Element) -> DType {
    match element {
        Element::F32 => DType::F32,
        Element::F16 => DType::F16,
        Element::Bf16 => DType::BF16,
        Element::F64 => DType::F64,
    }
}

/// A contiguous vector in `dtype`, in storage of its own.
pub(super) fn in_dtype<S: DeviceStorage>(layer: &str, vector: &Tensor, dtype: DType) -> Result<S> {
    let (storage, layout) = vector.storage_and_layout();
    match S::of(&storage) {
        Some(storage) => cast(storage, layout, dtype),
        None => messages::internal(layer, "statistics on the device of the input"),
    }
}

/// A launch and its arguments so far, in the order of the kernel.
pub(super) struct Call<'a, L: Launcher> {
    device: Device<'a, L>,
    launch: &'a Launch,
    args: Vec<Arg<'a, L::Storage>>,
}

impl<'a, L: Launcher> Call<'a, L> {
    fn arg(mut self, arg: Arg<'a, L::Storage>) -> Self {
        self.args.push(arg);
        self
    }

    pub(super) fn read(self, operand: &'a Operand<L::Storage>) -> Self {
        self.arg(Arg::Read(operand.storage(), operand.start))
    }

    pub(super) fn maybe_read(self, operand: Option<&'a Operand<L::Storage>>) -> Self {
        match operand {
            Some(operand) => self.read(operand),
            None => self.null(),
        }
    }

    /// All of a storage that a kernel has written.
    pub(super) fn read_all(self, storage: &'a L::Storage) -> Self {
        self.arg(Arg::Read(storage, 0))
    }

    pub(super) fn maybe_read_all(self, storage: Option<&'a L::Storage>) -> Self {
        match storage {
            Some(storage) => self.read_all(storage),
            None => self.null(),
        }
    }

    pub(super) fn write(self, storage: &'a mut L::Storage) -> Self {
        self.arg(Arg::Write(storage))
    }

    pub(super) fn maybe_write(self, storage: Option<&'a mut L::Storage>) -> Self {
        match storage {
            Some(storage) => self.write(storage),
            None => self.null(),
        }
    }

    pub(super) fn null(self) -> Self {
        self.arg(Arg::Null)
    }

    /// Sizes of tensors.
    pub(super) fn sizes(self, sizes: impl IntoIterator<Item = u64>) -> Self {
        let sizes = sizes.into_iter();
        sizes.fold(self, |call, size| call.arg(Arg::I64(size as i64)))
    }

    pub(super) fn int(self, value: i32) -> Self {
        self.arg(Arg::I32(value))
    }

    /// A number of parts, which the geometry keeps small.
    pub(super) fn parts(self, parts: u64) -> Self {
        self.int(parts as i32)
    }

    pub(super) fn flag(self, is_set: bool) -> Self {
        self.int(i32::from(is_set))
    }

    pub(super) fn float(self, value: f64) -> Self {
        self.arg(Arg::F64(value))
    }

    pub(super) fn run(mut self) -> Result<()> {
        let Device { layer, like } = self.device;
        count(|asked| asked.launches.push(self.launch.kernel.clone()));
        L::launch(layer, like, self.launch, &mut self.args)
    }
}
