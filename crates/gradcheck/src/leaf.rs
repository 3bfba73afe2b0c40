//! An input of the function under test: its values, and the memory layout that the function is to
//! see.
use super::multi_index;
use candle_core::{DType, Device, Result, Tensor, Var, bail};

/// Values in logical order, and how to lay them out as the given input was: the order of its axes
/// in memory, and where memory has elements that are not part of it.
pub(super) struct Leaf {
    values: Vec<f64>,
    dims: Vec<usize>,
    device: Device,
    /// Logical axes from the outermost in memory to the innermost.
    order: Vec<usize>,
    /// Axes in memory order, with one more entry: whether memory has elements to skip along this
    /// axis. The last entry stands for an axis of length one inside the innermost, which makes that
    /// one strided.
    gaps: Vec<bool>,
}

impl Leaf {
    pub(super) fn new(index: usize, input: &Tensor) -> Result<Self> {
        if input.dtype() != DType::F64 {
            bail!(
                "gradcheck: input {index} is {:?}, expected F64; convert it with \
                to_dtype(DType::F64)",
                input.dtype()
            )
        }
        let values: Vec<f64> = input.flatten_all()?.to_vec1()?;
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            bail!(
                "gradcheck: element {:?} of input {index} is {}, expected a finite value",
                multi_index(at, input.dims()),
                values[at],
            )
        }
        let (order, gaps) = memory_order(input);
        Ok(Self {
            values,
            dims: input.dims().to_vec(),
            device: input.device().clone(),
            order,
            gaps,
        })
    }

    pub(super) fn values(&self) -> &[f64] {
        &self.values
    }

    pub(super) fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// A variable from which [`Leaf::view`] makes the input.
    pub(super) fn variable(&self) -> Result<Var> {
        Var::from_tensor(&self.buffer(&self.values)?)
    }

    /// The input with other values.
    pub(super) fn tensor(&self, values: &[f64]) -> Result<Tensor> {
        self.view(&self.buffer(values)?)
    }

    /// The memory behind the input: its axes in memory order, with a leading zero along every axis
    /// that has a gap.
    fn buffer(&self, values: &[f64]) -> Result<Tensor> {
        let logical = Tensor::from_slice(values, self.dims.as_slice(), &self.device)?;
        let mut memory = logical.permute(self.order.as_slice())?;
        if self.strided_inside() {
            memory = memory.unsqueeze(self.dims.len())?;
        }
        for (axis, &gap) in self.gaps.iter().enumerate() {
            if gap {
                memory = memory.pad_with_zeros(axis, 1, 0)?;
            }
        }
        memory.contiguous()
    }

    /// The input, or its gradient, as a view into the memory behind it.
    pub(super) fn view(&self, memory: &Tensor) -> Result<Tensor> {
        let rank = self.dims.len();
        let mut view = memory.clone();
        for (axis, &gap) in self.gaps.iter().enumerate() {
            if gap {
                view = view.narrow(axis, 1, view.dim(axis)? - 1)?;
            }
        }
        if self.strided_inside() {
            view = view.squeeze(rank)?;
        }
        if self.order.is_sorted() {
            return Ok(view);
        }
        let mut inverse = vec![0; rank];
        for (memory_axis, &logical_axis) in self.order.iter().enumerate() {
            inverse[logical_axis] = memory_axis;
        }
        view.permute(inverse)
    }

    fn strided_inside(&self) -> bool {
        self.gaps[self.dims.len()]
    }
}

/// The order of the axes in memory and the gaps, as [`Leaf`] holds them. A broadcast input has
/// neither.
fn memory_order(input: &Tensor) -> (Vec<usize>, Vec<bool>) {
    let (dims, stride) = (input.dims(), input.stride());
    let rank = dims.len();
    let packed = ((0..rank).collect(), vec![false; rank + 1]);
    if input.elem_count() == 0 || (dims.iter().zip(stride)).any(|(&len, &s)| len > 1 && s == 0) {
        return packed;
    }
    let mut gaps = vec![false; rank + 1];
    if rank > 0 && input.layout().start_offset() > 0 {
        gaps[0] = true;
    }
    let mut order: Vec<usize> = (0..rank).collect();
    // The stride of an axis of length one means nothing: it stays beside its logical neighbor.
    let mut effective = stride.to_vec();
    for axis in (0..rank).rev() {
        if dims[axis] == 1 {
            effective[axis] = effective.get(axis + 1).copied().unwrap_or(1);
        }
    }
    order.sort_by_key(|&axis| std::cmp::Reverse(effective[axis]));
    let mut tight = 1;
    for (memory_axis, &axis) in order.iter().enumerate().rev() {
        if dims[axis] > 1 {
            gaps[memory_axis + 1] |= effective[axis] > tight;
            tight = effective[axis] * dims[axis];
        }
    }
    (order, gaps)
}
