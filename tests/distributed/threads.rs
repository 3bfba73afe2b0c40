//! The group of threads: sums, faults, and who is told.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use candle_core::{Result, bail};
use candle_norm::distributed::{Call, Collective, Threads, agree, at_step};

const SHORT: Duration = Duration::from_millis(200);

fn sum(group: &Arc<dyn Collective>, name: &'static str, mut values: Vec<f64>) -> Result<Vec<f64>> {
    group.all_reduce_sum(&Call::new(name), &mut values)?;
    Ok(values)
}

/// An error without the backtrace that candle appends.
fn message(error: &candle_core::Error) -> String {
    let text = error.to_string();
    text.lines().next().unwrap_or_default().to_string()
}

/// The message of each rank, all of which fail.
fn messages(
    size: usize,
    f: impl Fn(&Arc<dyn Collective>) -> Result<()> + Sync,
) -> Result<Vec<String>> {
    Threads::run_within(size, Duration::from_secs(10), |group| match f(&group) {
        Err(e) => Ok(e.to_string()),
        Ok(()) => Ok(String::new()),
    })
}

#[track_caller]
fn assert_all_say(messages: &[String], parts: &[&str]) {
    for (rank, message) in messages.iter().enumerate() {
        for part in parts {
            assert!(
                message.contains(part),
                "rank {rank}: no {part:?} in {message:?}"
            );
        }
    }
}

#[test]
fn sums_are_formed_in_the_order_of_the_ranks() -> Result<()> {
    // Another order loses another part.
    let values = [1e16, 1., -1e16, 1., 0.5];
    let want = values.into_iter().fold(0., |sum, v| sum + v);
    for _ in 0..20 {
        let sums = Threads::run(5, |group| {
            thread::sleep(Duration::from_micros(50 * ((group.rank() as u64 * 3) % 5)));
            sum(&group, "sum", vec![values[group.rank()]])
        })?;
        assert_eq!(sums, vec![vec![want]; 5]);
    }
    Ok(())
}

#[test]
fn each_kind_of_call_gives_every_rank_the_same() -> Result<()> {
    for size in [1, 2, 3, 8, 16] {
        let all = Threads::run(size, |group| {
            let rank = group.rank();
            assert_eq!(group.size(), size);
            let mut singles = [rank as f32, 0.5];
            group.all_reduce_sum_f32(&Call::new("f32"), &mut singles)?;
            let mut first = [rank as f64 + 7., f64::NAN];
            group.broadcast(&Call::new("first"), &mut first)?;
            assert!(first[1].is_nan());
            let nothing = sum(&group, "nothing", vec![])?;
            assert!(nothing.is_empty());
            Ok((singles, first[0]))
        })?;
        let ranks = (size * (size - 1) / 2) as f32;
        assert_eq!(all, vec![([ranks, size as f32 / 2.], 7.); size]);
    }
    Ok(())
}

#[test]
fn values_that_are_not_finite_are_summed() -> Result<()> {
    let sums = Threads::run(2, |group| {
        let inf = [f64::INFINITY, f64::NEG_INFINITY][group.rank()];
        sum(&group, "sum", vec![f64::INFINITY, inf])
    })?;
    assert!(sums.iter().all(|s| s[0] == f64::INFINITY && s[1].is_nan()));
    Ok(())
}

#[test]
fn a_group_is_split_by_color_in_the_order_of_the_ranks() -> Result<()> {
    let parts = Threads::run(7, |group| {
        let part = group.split([9, 2, 9, 2, 2, 9, 5][group.rank()])?;
        let ranks = sum(&part, "ranks", vec![group.rank() as f64])?;
        // The whole group is still of use, and so is a part of a part.
        let all = sum(&group, "all", vec![1.])?;
        let alone = part.split(part.rank())?;
        assert_eq!((alone.rank(), alone.size()), (0, 1));
        Ok((part.rank(), part.size(), ranks[0], all[0]))
    })?;
    assert_eq!(
        parts,
        [
            (0, 3, 7., 7.),
            (0, 3, 8., 7.),
            (1, 3, 7., 7.),
            (1, 3, 8., 7.),
            (2, 3, 8., 7.),
            (2, 3, 7., 7.),
            (0, 1, 6., 7.),
        ]
    );
    Ok(())
}

#[test]
fn different_lengths_are_an_error_on_all_ranks_and_the_group_goes_on() -> Result<()> {
    let said = messages(3, |group| {
        let len = if group.rank() == 2 { 4 } else { 3 };
        let outcome = sum(group, "gradients", vec![0.; len]);
        assert_eq!(sum(group, "after", vec![1.])?, [3.]);
        outcome.map(drop)
    })?;
    assert_all_say(
        &said,
        &[
            "a sum of 3 f64 by gradients of step 0 on rank 0",
            "a sum of 4 f64 by gradients of step 0 on rank 2",
        ],
    );
    Ok(())
}

#[test]
fn different_names_kinds_and_dtypes_are_an_error_on_all_ranks() -> Result<()> {
    let said = messages(2, |group| {
        sum(group, ["norm", "head"][group.rank()], vec![0.]).map(drop)
    })?;
    assert_all_say(
        &said,
        &["by norm of step 0 on rank 0", "by head of step 0 on rank 1"],
    );
    let said = messages(2, |group| match group.rank() {
        0 => group.broadcast(&Call::new("x"), &mut [0.]),
        _ => group.all_reduce_sum(&Call::new("x"), &mut [0.]),
    })?;
    assert_all_say(&said, &["a broadcast of 1 f64", "a sum of 1 f64"]);
    let said = messages(2, |group| match group.rank() {
        0 => group.all_reduce_sum_f32(&Call::new("x"), &mut [0.]),
        _ => group.all_reduce_sum(&Call::new("x"), &mut [0.]),
    })?;
    assert_all_say(&said, &["a sum of 1 f32", "a sum of 1 f64"]);
    let said = messages(2, |group| match group.rank() {
        0 => group.split(0).map(drop),
        _ => group.all_reduce_sum(&Call::new("x"), &mut [0.]),
    })?;
    assert_all_say(&said, &["split of step 0 on rank 0"]);
    Ok(())
}

/// A rank that skips a step makes the calls of the next one: same name, same length.
#[test]
fn a_skipped_step_is_an_error_on_all_ranks() -> Result<()> {
    let said = messages(4, |group| {
        for step in 0..10 {
            if group.rank() == 1 && step == 6 {
                continue;
            }
            at_step(step, || sum(group, "loss", vec![1.]))?;
        }
        Ok(())
    })?;
    assert_all_say(
        &said,
        &["loss of step 6 on rank 0", "loss of step 7 on rank 1"],
    );
    Ok(())
}

#[test]
fn who_is_missing_is_named_and_who_is_late_is_told() -> Result<()> {
    let said = Threads::run_within(4, SHORT, |group| {
        if group.rank() % 2 == 1 {
            thread::sleep(3 * SHORT);
        }
        let outcome = sum(&group, "loss", vec![1.]);
        Ok(outcome.unwrap_err().to_string())
    })?;
    assert_all_say(
        &said,
        &[
            "in a sum of 1 f64 by loss of step 0 within 200ms",
            "ranks [1, 3]",
        ],
    );
    Ok(())
}

/// Well below the time limit of a call.
fn at_once(start: Instant) {
    assert!(
        start.elapsed() < Duration::from_secs(20),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn the_error_of_a_rank_is_that_of_the_run_and_reaches_the_others_at_once() {
    let start = Instant::now();
    let failed = Threads::run(4, |group| {
        sum(&group, "first", vec![1.])?;
        if group.rank() == 2 {
            bail!("no more data")
        }
        let error = sum(&group, "second", vec![1.]).unwrap_err();
        assert!(
            error.to_string().contains("rank 2 failed: no more data"),
            "{error}"
        );
        Err::<(), _>(error)
    });
    assert_eq!(message(&failed.unwrap_err()), "no more data");
    at_once(start);
}

#[test]
fn a_panic_is_an_error_of_the_run_and_reaches_the_others_at_once() {
    let start = Instant::now();
    let failed = Threads::run(3, |group| {
        if group.rank() == 0 {
            panic!("index {} out of range", 5)
        }
        let error = sum(&group, "first", vec![1.]).unwrap_err();
        assert!(
            error.to_string().contains("rank 0 panicked: index 5"),
            "{error}"
        );
        Ok(())
    });
    let message = failed.unwrap_err().to_string();
    assert!(message.contains("index 5 out of range"), "{message}");
    at_once(start);
}

#[test]
fn a_rank_that_returns_early_or_drops_its_group_is_named() -> Result<()> {
    let start = Instant::now();
    let said = Threads::run(3, |group| {
        let part = group.split(0)?;
        if group.rank() == 1 {
            return Ok(None);
        }
        let whole = sum(&group, "whole", vec![1.]).unwrap_err();
        let part = sum(&part, "part", vec![1.]).unwrap_err();
        Ok(Some([whole, part].map(|e| e.to_string())))
    })?;
    for said in said.into_iter().flatten().flatten() {
        assert!(
            said.contains("rank 1 returned") || said.contains("rank 1 dropped"),
            "{said}"
        );
    }
    let mut ranks = Threads::group(2, Duration::from_secs(60))?;
    drop(ranks.remove(0));
    let error = sum(&ranks[0], "alone", vec![1.]).unwrap_err().to_string();
    assert!(error.contains("rank 0 dropped the group"), "{error}");
    at_once(start);
    Ok(())
}

#[test]
fn after_a_rank_is_missing_every_call_fails_at_once() -> Result<()> {
    let ranks = Threads::group(2, SHORT)?;
    let first = message(&sum(&ranks[0], "first", vec![1.]).unwrap_err());
    let start = Instant::now();
    for rank in &ranks {
        assert_eq!(message(&sum(rank, "again", vec![1.]).unwrap_err()), first);
    }
    assert!(start.elapsed() < SHORT);
    Ok(())
}

#[test]
fn a_group_has_a_rank() {
    let error = Threads::group(0, SHORT).unwrap_err().to_string();
    assert!(error.contains("at least one rank"), "{error}");
}

#[test]
fn an_error_on_one_rank_is_an_error_on_all() -> Result<()> {
    for failing in [vec![0], vec![3], vec![1, 2]] {
        let said = messages(4, |group| {
            let result = match failing.contains(&group.rank()) {
                true => Err(candle_core::Error::Msg("own".into())),
                false => Ok(()),
            };
            agree(&**group, "load", result)
        })?;
        for (rank, said) in said.iter().enumerate() {
            let part = match (failing.contains(&rank), failing.as_slice()) {
                (true, _) => "own".to_string(),
                (false, [one]) => {
                    format!("load: expected every rank to go on, got an error on rank {one}")
                }
                (false, _) => "errors on 2 ranks".to_string(),
            };
            assert!(said.contains(&part), "rank {rank}: {said}");
        }
    }
    let fine = Threads::run(3, |group| agree(&*group, "load", Ok(group.rank())))?;
    assert_eq!(fine, [0, 1, 2]);
    Ok(())
}

#[test]
fn steps_nest_and_end_by_a_panic() {
    let step = || Call::new("x").step();
    at_step(3, || {
        at_step(4, || assert_eq!(step(), 4));
        assert_eq!(step(), 3);
        let panicked = std::panic::catch_unwind(|| at_step(9, || panic!("away")));
        assert!(panicked.is_err());
        assert_eq!(step(), 3);
    });
    assert_eq!(step(), 0);
}

/// Slow ranks, in an order that changes, and calls of many lengths.
#[test]
fn two_thousand_steps_on_eight_ranks() -> Result<()> {
    Threads::run(8, |group| {
        for step in 0..2000u64 {
            at_step(step, || {
                let len = (step * 7 % 33) as usize;
                if (step + group.rank() as u64).is_multiple_of(97) {
                    thread::yield_now();
                }
                let mine = (0..len).map(|i| (i + group.rank()) as f64).collect();
                let want: Vec<f64> = (0..len).map(|i| (8 * i + 28) as f64).collect();
                assert_eq!(sum(&group, "soak", mine)?, want);
                Ok::<_, candle_core::Error>(())
            })?;
        }
        Ok(())
    })?;
    Ok(())
}
