//! Several ranks that train one model: groups of processes, hosts or threads, and what they sum.
//!
//! A rank holds a copy of the model and computes on its share of each batch. [`Collective`] is the
//! group that it belongs to; [`Threads`] is such a group in one process, and the crate
//! `candle-norm-mpi` has one over MPI.
//!
//! - [`BatchNorm::synchronized`](crate::BatchNorm::synchronized) forms the statistics of a layer
//!   over the batches of all ranks, and likewise InstanceNorm and SwitchNorm.
//! - [`broadcast_vars`] makes the models equal, [`sum_gradients`] keeps them so, and
//!   [`assert_same`] looks whether they are. [`clip_gradients`] bounds the length of the sums.
//! - [`shuffled`], [`batches`] and [`shard`] deal out the samples, none of them twice and no share
//!   empty.
//! - Each rank makes the same calls in the same order. [`at_step`] gives them the number of the
//!   training step, so that a rank that skipped one is an error on every rank, and [`agree`] makes
//!   the error of one rank an error of all.
//!
//! The loss of a rank is the **sum** over its samples, divided by the number of samples of **all**
//! ranks, and gradients are summed. Then uneven shares weigh what they should, and the training is
//! that of one rank with the whole batch:
//!
//! ```
//! use candle_core::{DType, Device, Result, Tensor};
//! use candle_nn::{ModuleT, Optimizer, SGD, VarBuilder, VarMap};
//! use candle_norm::distributed::{
//!     Threads, assert_same, at_step, batches, broadcast_vars, shard, shuffled, sum_gradients,
//! };
//! use candle_norm::{batch_norm, trainable_vars};
//!
//! let data: Vec<f32> = (0..24).map(|i| (i as f32 * 0.7).sin()).collect();
//! let train = |ranks: usize| {
//!     let weights = Threads::run(ranks, |group| {
//!         let vars = VarMap::new();
//!         let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//!         let norm = batch_norm(2, 1e-5, vb)?.synchronized(group.clone());
//!         broadcast_vars(&*group, &vars)?;
//!         let vars_of_training = trainable_vars(&vars);
//!         let mut optimizer = SGD::new(vars_of_training.clone(), 0.1)?;
//!         let order = shuffled(12, 7, 0);
//!         for (step, batch) in batches(&order, 6, ranks)?.enumerate() {
//!             at_step(step as u64, || {
//!                 let mine = shard(batch, group.rank(), ranks)?;
//!                 let rows = mine.iter().flat_map(|i| data[2 * i..][..2].to_vec());
//!                 let rows: Vec<f32> = rows.collect();
//!                 let x = Tensor::from_vec(rows, (mine.len(), 2), &Device::Cpu)?;
//!                 let y = norm.forward_t(&x, true)?;
//!                 let loss = ((y - 1.)?.sqr()?.sum_all()? / batch.len() as f64)?;
//!                 let mut grads = loss.backward()?;
//!                 sum_gradients(&*group, &vars_of_training, &mut grads)?;
//!                 optimizer.step(&grads)
//!             })?;
//!         }
//!         assert_same(&*group, &vars)?;
//!         norm.bias().unwrap().to_vec1::<f32>()
//!     })?;
//!     Ok::<_, candle_core::Error>(weights[0].clone())
//! };
//! for (one, three) in train(1)?.into_iter().zip(train(3)?) {
//!     assert!((one - three).abs() < 1e-6);
//! }
//! # Ok::<(), candle_core::Error>(())
//! ```

mod digest;
mod gradients;
mod shard;
mod vars;

#[cfg(feature = "nccl")]
pub use crate::collective::Nccl;
pub use crate::collective::{Call, Collective, DeviceSums, Threads, agree, at_step};
pub use gradients::{clip_gradients, sum_gradients};
pub use shard::{batches, shard, shuffled};
pub use vars::{assert_same, broadcast_vars};
