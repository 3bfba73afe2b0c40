//! Statements of the table of layers about them.

use std::collections::HashSet;

use candle_core::{DType, Result};
use candle_nn::VarMap;
use candle_norm::{Affine, NormConfig};

use testkit::data::{bits, noise};
use testkit::subjects::Subject;
use testkit::table::{self, LAYERS};
use testkit::vars::vb;

const DIMS: [usize; 4] = [3, 4, 5, 7];

#[test]
fn names_are_names_of_one_thing() {
    let layers: HashSet<_> = LAYERS.iter().map(|layer| layer.name).collect();
    assert_eq!(layers.len(), LAYERS.len());
    let forms: HashSet<_> = table::forms().map(|(_, form)| form.name).collect();
    assert_eq!(forms.len(), table::forms().count());
    let tracked: HashSet<_> = table::tracked().map(|which| which.name).collect();
    assert_eq!(tracked.len(), table::tracked().count());
}

/// Every norm that has a name for configurations is in the table.
#[test]
fn every_norm_has_an_entry() -> Result<()> {
    let kinds: HashSet<_> = (table::forms())
        .map(|(_, form)| Ok((form.build)(&DIMS, vb(&VarMap::new(), DType::F32))?.kind()))
        .collect::<Result<_>>()?;
    let refused = "unknown".parse::<NormConfig>().map_err(|e| e.to_string());
    let refused = refused.expect_err("a name of no norm");
    let (_, names) = refused.split_once("expected ").expect("what is expected");
    let (names, _) = names.split_once(", got").expect("what came");
    let names = names
        .replace(" (N groups, at least 1)", "")
        .replace(" or ", ", ");
    for name in names.split(", ").map(|name| name.trim_end_matches(":N")) {
        // "none" does nothing, "weight" normalizes no input, and "dyt", which has no statistics, is
        // in the table of functions.
        let others = ["none", "weight", "dyt"].contains(&name);
        assert!(others || kinds.contains(name), "{name} of {names}");
    }
    for kind in kinds {
        assert!(names.contains(kind), "{kind} of {names}");
    }
    Ok(())
}

/// Parameters, statistics and modes are those that a form says it has.
#[test]
fn forms_are_what_they_say() -> Result<()> {
    for (layer, form) in table::forms() {
        let what = form.name;
        assert!(what.starts_with(layer.name), "{what}");
        let norm = (form.build)(&DIMS, vb(&VarMap::new(), DType::F64))?;
        let has = |name: &str| norm.parameters().iter().any(|(n, _)| *n == name);
        let affine = match (has("weight"), has("bias")) {
            (true, true) => Affine::WeightAndBias,
            (true, false) => Affine::Weight,
            (false, true) => Affine::Bias,
            (false, false) => Affine::None,
        };
        assert_eq!(affine, form.affine, "{what}");
        assert_eq!(norm.running_stats().is_some(), form.statistics, "{what}");
        let x = noise(&DIMS, DType::F64)?;
        let [train, infer] = [true, false].map(|train| norm.forward_t(&x, train));
        let modes = bits(&train?)? != bits(&infer?)?;
        assert_eq!(modes, form.statistics, "{what}");
    }
    Ok(())
}

/// Kinds take the shapes that they are listed for, and those alone are listed.
#[test]
fn shapes_fit() {
    for layer in LAYERS {
        let lists = [layer.tiny, layer.short, layer.long, layer.ragged];
        for (kind, dims) in lists.into_iter().flat_map(table::shapes) {
            let kinds = (layer.kinds)(dims);
            // Any offset may be added to a weight.
            let same = |k: &_| std::mem::discriminant(k) == std::mem::discriminant(&kind);
            assert!(kinds.iter().any(same), "{kind:?} of {dims:?}");
            let params: usize = Subject::new(kind, 1e-5).param_dims(dims).iter().product();
            assert!(params > 0);
        }
        assert!(
            !layer.tiny.is_empty() && !layer.short.is_empty(),
            "{}",
            layer.name
        );
        assert!(
            !layer.long.is_empty() && !layer.ragged.is_empty(),
            "{}",
            layer.name
        );
    }
}
