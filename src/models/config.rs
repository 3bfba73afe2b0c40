//! A normalization layer as a value.

use std::fmt;
use std::str::FromStr;

use candle_core::{Error, Result, bail};
use candle_nn::VarBuilder;

use super::name;
use crate::layers::batch_norm::BatchNormOptions;
use crate::layers::batch_renorm::BatchRenormOptions;
use crate::layers::dyt::DyTOptions;
use crate::layers::group_norm::{GroupNormOptions, GroupNormSpec};
use crate::layers::instance_norm::InstanceNormOptions;
use crate::layers::layer_norm::LayerNormOptions;
use crate::layers::rms_norm::RmsNormOptions;
use crate::layers::scale_norm::ScaleNormOptions;
use crate::layers::switch_norm::SwitchNormOptions;
use crate::layers::weight_norm::WeightNormOptions;
use crate::layers::{Identity, NONE, Names, Norm, NormOptions};

/// The variants of [`NormConfig`], each with the type that implements [`NormOptions`] for it. A
/// variant holds that type itself, or its fields.
macro_rules! norms {
    (
        $(#[$meta:meta])*
        pub enum NormConfig {
            $(
                $(#[$doc:meta])*
                $variant:ident $fields:tt: $spec:ident,
            )*
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq)]
        #[non_exhaustive]
        pub enum NormConfig {
            /// No normalization.
            None,
            $(
                $(#[$doc])*
                $variant $fields,
            )*
        }

        /// Names of all norms, in the order of the variants.
        const KINDS: &[Names] = &[NONE, $(<$spec as NormOptions>::NAMES),*];

        impl NormConfig {
            /// The options of the layer, if there is one.
            fn options(self) -> Option<Box<dyn AnyOptions>> {
                $(
                    if let Some(options) = norms!(@options self, $variant $fields: $spec) {
                        return Some(Box::new(options));
                    }
                )*
                None
            }

            /// The norm of a name that is written, and of the text after a colon.
            fn of(name: &str, argument: Option<&str>) -> Option<Self> {
                $(
                    if name == <$spec as NormOptions>::NAMES.name {
                        let options = <$spec as NormOptions>::parse(argument)?;
                        return Some(norms!(@config options, $variant $fields));
                    }
                )*
                argument.is_none().then_some(Self::None)
            }
        }

        #[cfg(feature = "serde")]
        impl NormConfig {
            /// Writes a map from the name to the options.
            fn write_options<S: serde::Serializer>(
                self,
                serializer: S,
            ) -> std::result::Result<S::Ok, S::Error> {
                let mut index = 0;
                $(
                    if let Some(options) = norms!(@options self, $variant $fields: $spec) {
                        let name = <$spec as NormOptions>::NAMES.name;
                        return serializer
                            .serialize_newtype_variant("Options", index, name, &options);
                    }
                    index += 1;
                )*
                let _ = index;
                serializer.serialize_str(NONE.name)
            }

            /// Reads the options of the norm whose name was just read; none if it has no options.
            fn read_options<'de, A: serde::de::MapAccess<'de>>(
                name: &str,
                map: &mut A,
            ) -> std::result::Result<Option<Self>, A::Error> {
                $(
                    if name == <$spec as NormOptions>::NAMES.name {
                        let options = map.next_value::<$spec>()?;
                        return Ok(Some(norms!(@config options, $variant $fields)));
                    }
                )*
                Ok(None)
            }
        }
    };
    (@options $config:expr, $variant:ident ($options:ty): $spec:ident) => {
        match $config {
            NormConfig::$variant(options) => Some(options),
            _ => None,
        }
    };
    (
        @options $config:expr,
        $variant:ident { $($(#[$doc:meta])* $field:ident: $type:ty,)* }: $spec:ident
    ) => {
        match $config {
            NormConfig::$variant { $($field),* } => Some($spec { $($field),* }),
            _ => None,
        }
    };
    (@config $options:ident, $variant:ident ($type:ty)) => {
        NormConfig::$variant($options)
    };
    (@config $options:ident, $variant:ident { $($(#[$doc:meta])* $field:ident: $type:ty,)* }) => {
        NormConfig::$variant { $($field: $options.$field),* }
    };
}

norms! {
    /// The normalization that a model uses: a value that comes from a command line or a
    /// configuration file.
    ///
    /// Written and read as `"none"`, `"batch"`, `"layer"`, `"group:8"` (the number of groups),
    /// `"instance"`, `"rms"`, `"scale"`, `"switch"`, `"weight"`, `"batch_renorm"` or `"dyt"`, with
    /// default options; with the feature `serde` also as a map that gives options, such as
    /// `{"batch": {"momentum": null}}` or `{"dyt": {"function": "erf"}}`.
    ///
    /// Read are also the names of the classes in PyTorch and of papers, in any case, with
    /// blanks, `-` or `_` in them: `"BatchNorm2d"`, `"LayerNorm"`, `"layer_norm"`, `"RMSNorm"`,
    /// `"GroupNorm:32"`, `"gn:32"`, `"Identity"`. An ending such as `2d` says nothing here:
    /// every layer serves every rank.
    ///
    /// The axes that a layer runs along depend on the data, so they are never guessed:
    /// [`channels`](Self::channels) builds the layer for `[N, C, *]`,
    /// [`features`](Self::features) the one for `[*, F]`.
    ///
    /// ```
    /// use candle_norm::{BatchNormOptions, NormConfig};
    ///
    /// let norm: NormConfig = "group:8".parse()?;
    /// assert_eq!(norm.to_string(), "group:8");
    /// let cumulative = BatchNormOptions { momentum: None, ..Default::default() };
    /// assert_eq!(NormConfig::Batch(cumulative).to_string(), "batch");
    /// assert_eq!("BatchNorm2d".parse::<NormConfig>()?.to_string(), "batch");
    /// let error = "grup:8".parse::<NormConfig>().unwrap_err().to_string();
    /// assert!(error.contains(r#"did you mean "group:8"?"#));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub enum NormConfig {
        /// [`BatchNorm`](crate::BatchNorm).
        Batch(BatchNormOptions): BatchNormOptions,
        /// [`LayerNorm`](crate::LayerNorm).
        Layer(LayerNormOptions): LayerNormOptions,
        /// [`GroupNorm`](crate::GroupNorm).
        Group {
            /// The number of groups that the channels form.
            num_groups: usize,
            /// The rest of its configuration.
            options: GroupNormOptions,
        }: GroupNormSpec,
        /// [`InstanceNorm`](crate::InstanceNorm).
        Instance(InstanceNormOptions): InstanceNormOptions,
        /// [`RmsNorm`](crate::RmsNorm).
        Rms(RmsNormOptions): RmsNormOptions,
        /// [`ScaleNorm`](crate::ScaleNorm).
        Scale(ScaleNormOptions): ScaleNormOptions,
        /// [`SwitchNorm`](crate::SwitchNorm).
        Switch(SwitchNormOptions): SwitchNormOptions,
        /// [`WeightNorm`](crate::WeightNorm), which goes around a layer instead of after it.
        Weight(WeightNormOptions): WeightNormOptions,
        /// [`BatchRenorm`](crate::BatchRenorm).
        BatchRenorm(BatchRenormOptions): BatchRenormOptions,
        /// [`DyT`](crate::DyT).
        Dyt(DyTOptions): DyTOptions,
    }
}

/// [`NormOptions`] of any layer.
trait AnyOptions {
    fn names(&self) -> Names;
    fn argument(&self) -> Option<String>;
    fn has_bias(&self) -> bool;
    fn channels(&self, num_channels: usize, vb: VarBuilder) -> Result<Box<dyn Norm>>;
    fn features(&self, num_features: usize, vb: VarBuilder) -> Result<Box<dyn Norm>>;
}

impl<O: NormOptions> AnyOptions for O {
    fn names(&self) -> Names {
        O::NAMES
    }
    fn argument(&self) -> Option<String> {
        O::argument(self)
    }
    fn has_bias(&self) -> bool {
        O::has_bias(self)
    }
    fn channels(&self, num_channels: usize, vb: VarBuilder) -> Result<Box<dyn Norm>> {
        O::channels(self, num_channels, vb)
    }
    fn features(&self, num_features: usize, vb: VarBuilder) -> Result<Box<dyn Norm>> {
        O::features(self, num_features, vb)
    }
}

impl NormConfig {
    /// The layer for channels on axis 1 of `[N, num_channels, *]`.
    ///
    /// `Layer`, `Rms` and `Scale` normalize the channels of each position, as ConvNeXt does; their
    /// `channels_first` is set, and so is that of `Dyt`.
    ///
    /// # Errors
    /// Options out of range; `Weight`, which needs the layer that it goes around.
    pub fn channels(&self, num_channels: usize, vb: VarBuilder) -> Result<Box<dyn Norm>> {
        match self.options() {
            Some(options) => options.channels(num_channels, vb),
            None => Ok(Box::new(Identity)),
        }
    }

    /// The layer for features on the last axis of `[*, num_features]`.
    ///
    /// `Batch`, `BatchRenorm`, `Group` and `Instance` take the features as channels, and all axes
    /// between the first and the last as space. So does `Switch`, without instances: its
    /// `spatial_dims` is set to 0.
    ///
    /// # Errors
    /// Options out of range; `Weight`, which needs the layer that it goes around.
    pub fn features(&self, num_features: usize, vb: VarBuilder) -> Result<Box<dyn Norm>> {
        match self.options() {
            Some(options) => options.features(num_features, vb),
            None => Ok(Box::new(Identity)),
        }
    }

    /// Whether the layer has a shift of its own, so that a bias before it would do nothing more.
    pub(super) fn has_bias(&self) -> bool {
        self.options().is_some_and(|options| options.has_bias())
    }
}

impl fmt::Display for NormConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(options) = self.options() else {
            return f.write_str(NONE.name);
        };
        f.write_str(options.names().name)?;
        match options.argument() {
            Some(argument) => write!(f, ":{argument}"),
            None => Ok(()),
        }
    }
}

/// The forms that a norm is written in, for messages.
fn forms() -> String {
    let form = |names: &Names| match names.argument {
        Some(argument) => format!("{}:{}", names.name, argument.form),
        None => names.name.to_string(),
    };
    let forms: Vec<String> = KINDS.iter().map(form).collect();
    match forms.split_last() {
        Some((last, rest)) => format!("{} or {last}", rest.join(", ")),
        None => String::new(),
    }
}

impl FromStr for NormConfig {
    type Err = Error;

    /// The norm of a name as [`NormConfig`] describes them.
    fn from_str(s: &str) -> Result<Self> {
        let (name, argument) = match s.split_once(':') {
            Some((name, argument)) => (name, Some(argument.trim())),
            None => (s, None),
        };
        let Some(names) = name::kind(KINDS, name) else {
            let remedy = match name::nearest(KINDS, s) {
                Some(near) => format!("; did you mean {near:?}?"),
                None => String::new(),
            };
            bail!("NormConfig: expected {}, got {s:?}{remedy}", forms())
        };
        let name = names.name;
        match (Self::of(name, argument), names.argument) {
            (Some(config), _) => Ok(config),
            (None, Some(argument)) => bail!(
                "NormConfig: expected {} after \"{name}:\", such as \"{name}:{}\", got {s:?}",
                argument.expected,
                argument.example
            ),
            (None, None) => {
                let with_number = KINDS.iter().filter(|names| names.argument.is_some());
                let with_number: Vec<&str> = with_number.map(|names| names.name).collect();
                bail!(
                    "NormConfig: expected nothing after {name:?}, since only {} norm takes a \
                     number, got {s:?}; options are fields of the variant, and in a file a map \
                     such as {{\"batch\": {{\"eps\": 0.001}}}}",
                    with_number.join(" and ")
                )
            }
        }
    }
}

#[cfg(feature = "serde")]
mod serde_form {
    //! In a file, a layer is its name, or a map from its name to its options.

    use serde::de::{self, Deserializer, IgnoredAny, MapAccess, Visitor};
    use serde::{Deserialize, Serialize, Serializer};

    use super::*;

    impl Serialize for NormConfig {
        fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
            let name = self.to_string();
            match name.parse::<NormConfig>() {
                Ok(plain) if plain == *self => serializer.serialize_str(&name),
                _ => self.write_options(serializer),
            }
        }
    }

    // An untagged enum would read both forms too, but say of every mistake only that no form
    // matched.
    impl<'de> Deserialize<'de> for NormConfig {
        fn deserialize<D: Deserializer<'de>>(
            deserializer: D,
        ) -> std::result::Result<Self, D::Error> {
            deserializer.deserialize_any(NameOrOptions)
        }
    }

    struct NameOrOptions;

    impl<'de> Visitor<'de> for NameOrOptions {
        type Value = NormConfig;

        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("the name of a norm, or a map from its name to its options")
        }

        fn visit_str<E: de::Error>(self, name: &str) -> std::result::Result<NormConfig, E> {
            name.parse().map_err(E::custom)
        }

        fn visit_map<A: MapAccess<'de>>(
            self,
            mut map: A,
        ) -> std::result::Result<NormConfig, A::Error> {
            let Some(name) = map.next_key::<String>()? else {
                return Err(de::Error::custom("NormConfig: expected one norm, got none"));
            };
            let Some(names) = name::kind(KINDS, &name) else {
                return Err(match name.parse::<NormConfig>() {
                    Ok(_) => de::Error::custom(format!(
                        "NormConfig: expected the number of groups among the options, as in \
                         {{\"group\": {{\"num_groups\": 8}}}}, got {name:?}"
                    )),
                    Err(error) => de::Error::custom(error),
                });
            };
            let Some(config) = NormConfig::read_options(names.name, &mut map)? else {
                return Err(de::Error::custom(
                    "NormConfig: expected a norm with options, got none, which has no options: \
                     write its name alone",
                ));
            };
            if map.next_key::<IgnoredAny>()?.is_some() {
                return Err(de::Error::custom(
                    "NormConfig: expected one norm, got several",
                ));
            }
            // A norm without a name is none: a group norm without groups.
            config
                .to_string()
                .parse::<NormConfig>()
                .map_err(de::Error::custom)?;
            Ok(config)
        }
    }
}
