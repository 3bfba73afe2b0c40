//! Computations without kernels, which take the composed form.

use candle_core::Result;

use super::{Cuda, Launcher, View};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, Computation, Cumulative, Dynamic, Gradients};
use candle_norm_support::messages;

macro_rules! without_kernels {
    ($($computation:ident),+) => {$(
        impl<L: Launcher> On<Cuda<L>> for $computation {
            type Saved = ();

            fn is_carried_out(&self) -> bool {
                false
            }

            fn forward(&self, _: Args<View<L::Storage>>) -> Result<Forward<L::Storage, ()>> {
                messages::internal(self.layer(), "its composed form")
            }

            fn backward(&self, _: Backward<L::Storage, ()>) -> Result<Gradients<L::Storage>> {
                messages::internal(self.layer(), "its composed form")
            }
        }
    )+};
}
without_kernels!(Cumulative, Dynamic);
