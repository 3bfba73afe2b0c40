//! A normalization layer as a value.

use std::fmt;
use std::str::FromStr;

use candle_core::{Error, Result, bail};
use candle_nn::VarBuilder;

use super::name;
use crate::layers::{Identity, Norm, OnLastAxis};
use crate::{
    BatchNormOptions, GroupNormOptions, InstanceNormOptions, LayerNormOptions, RmsNormOptions,
    SwitchNormOptions, WeightNormOptions, batch_norm, group_norm, instance_norm, layer_norm,
    rms_norm, switch_norm,
};

/// The normalization that a model uses: a value that comes from a command line or a configuration
/// file.
///
/// Written and read as `"none"`, `"batch"`, `"layer"`, `"group:8"` (the number of groups),
/// `"instance"`, `"rms"`, `"switch"` or `"weight"`, with default options; with the feature `serde`
/// also as a map that gives options, such as `{"batch": {"momentum": null}}`.
///
/// Read are also the names of the classes in PyTorch and of papers, in any case, with blanks, `-`
/// or `_` in them: `"BatchNorm2d"`, `"LayerNorm"`,
/// `"layer_norm"`, `"RMSNorm"`, `"GroupNorm:32"`, `"gn:32"`, `"Identity"`. An ending such as `2d`
/// says nothing here: every layer serves every rank.
///
/// Which axes a layer runs along depends on the data, so it is never guessed:
/// [`channels`](Self::channels) builds the layer for `[N, C, *]`, [`features`](Self::features) the
/// one for `[*, F]`.
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
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(into = "serde_form::Form"))]
pub enum NormConfig {
    /// No normalization.
    None,
    /// [`BatchNorm`](crate::BatchNorm).
    Batch(BatchNormOptions),
    /// [`LayerNorm`](crate::LayerNorm).
    Layer(LayerNormOptions),
    /// [`GroupNorm`](crate::GroupNorm).
    Group {
        /// The number of groups that the channels form.
        num_groups: usize,
        /// The rest of its configuration.
        options: GroupNormOptions,
    },
    /// [`InstanceNorm`](crate::InstanceNorm).
    Instance(InstanceNormOptions),
    /// [`RmsNorm`](crate::RmsNorm).
    Rms(RmsNormOptions),
    /// [`SwitchNorm`](crate::SwitchNorm).
    Switch(SwitchNormOptions),
    /// [`WeightNorm`](crate::WeightNorm), which goes around a layer instead of after it.
    Weight(WeightNormOptions),
}

impl NormConfig {
    /// The layer for channels on axis 1 of `[N, num_channels, *]`.
    ///
    /// `Layer` and `Rms` normalize the channels of each position, as ConvNeXt does; their
    /// `channels_first` is set.
    ///
    /// # Errors
    /// Options out of range; `Weight`, which needs the layer that it goes around.
    pub fn channels(&self, num_channels: usize, vb: VarBuilder) -> Result<Box<dyn Norm>> {
        Ok(match *self {
            Self::None => Box::new(Identity),
            Self::Batch(options) => Box::new(batch_norm(num_channels, options, vb)?),
            Self::Layer(options) => {
                let options = LayerNormOptions {
                    channels_first: true,
                    ..options
                };
                Box::new(layer_norm(num_channels, options, vb)?)
            }
            Self::Group {
                num_groups,
                options,
            } => Box::new(group_norm(num_groups, num_channels, options, vb)?),
            Self::Instance(options) => Box::new(instance_norm(num_channels, options, vb)?),
            Self::Rms(options) => {
                let options = RmsNormOptions {
                    channels_first: true,
                    ..options
                };
                Box::new(rms_norm(num_channels, options, vb)?)
            }
            Self::Switch(options) => Box::new(switch_norm(num_channels, options, vb)?),
            Self::Weight(_) => bail!(
                "NormConfig: expected a norm that follows a layer, got \"weight\", which goes \
                around one; build the two together with NormConfig::linear, conv1d, conv2d, \
                conv_transpose1d or conv_transpose2d"
            ),
        })
    }

    /// The layer for features on the last axis of `[*, num_features]`.
    ///
    /// `Batch`, `Group` and `Instance` take the features as channels, and all axes between the
    /// first and the last as space. So does `Switch`, without instances: its `spatial_dims` is set
    /// to 0.
    ///
    /// # Errors
    /// Options out of range; `Weight`, which needs the layer that it goes around.
    pub fn features(&self, num_features: usize, vb: VarBuilder) -> Result<Box<dyn Norm>> {
        Ok(match *self {
            Self::Layer(options) => {
                let options = LayerNormOptions {
                    channels_first: false,
                    ..options
                };
                Box::new(layer_norm(num_features, options, vb)?)
            }
            Self::Rms(options) => {
                let options = RmsNormOptions {
                    channels_first: false,
                    ..options
                };
                Box::new(rms_norm(num_features, options, vb)?)
            }
            Self::Switch(options) => {
                let options = SwitchNormOptions {
                    spatial_dims: 0,
                    ..options
                };
                Box::new(OnLastAxis {
                    norm: Box::new(switch_norm(num_features, options, vb)?),
                    num_features,
                })
            }
            Self::None => Box::new(Identity),
            Self::Batch(_) | Self::Group { .. } | Self::Instance(_) | Self::Weight(_) => {
                Box::new(OnLastAxis {
                    norm: self.channels(num_features, vb)?,
                    num_features,
                })
            }
        })
    }

    /// Whether the layer has a shift of its own, so that a bias before it would do nothing more.
    pub(super) fn has_bias(&self) -> bool {
        match self {
            Self::None | Self::Weight(_) => false,
            Self::Batch(o) => o.affine.has_bias(),
            Self::Layer(o) => o.affine.has_bias(),
            Self::Group { options, .. } => options.affine.has_bias(),
            Self::Instance(o) => o.affine.has_bias(),
            Self::Rms(o) => o.affine.has_bias(),
            Self::Switch(o) => o.affine.has_bias(),
        }
    }
}

impl fmt::Display for NormConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Batch(_) => f.write_str("batch"),
            Self::Layer(_) => f.write_str("layer"),
            Self::Group { num_groups, .. } => write!(f, "group:{num_groups}"),
            Self::Instance(_) => f.write_str("instance"),
            Self::Rms(_) => f.write_str("rms"),
            Self::Switch(_) => f.write_str("switch"),
            Self::Weight(_) => f.write_str("weight"),
        }
    }
}

impl FromStr for NormConfig {
    type Err = Error;

    /// The norm of a name as [`NormConfig`] describes them.
    fn from_str(s: &str) -> Result<Self> {
        let (name, number) = match s.split_once(':') {
            Some((name, number)) => (name, Some(number.trim())),
            None => (s, None),
        };
        let Some(kind) = name::kind(name) else {
            let remedy = match name::nearest(s) {
                Some(near) => format!("; did you mean {near:?}?"),
                None => String::new(),
            };
            bail!(
                "NormConfig: expected none, batch, layer, group:N (N groups, at least 1), \
                instance, rms, switch or weight, got {s:?}{remedy}"
            )
        };
        let groups = number.and_then(|n| n.parse().ok().filter(|n| *n > 0));
        Ok(match (kind, number, groups) {
            ("group", _, Some(num_groups)) => Self::Group {
                num_groups,
                options: GroupNormOptions::default(),
            },
            ("group", _, None) => bail!(
                "NormConfig: expected a number of groups of at least 1 after \"group:\", such as \
                \"group:32\", got {s:?}"
            ),
            (kind, Some(_), _) => bail!(
                "NormConfig: expected nothing after {kind:?}, since only group norm takes a \
                number, got {s:?}; options are fields of the variant, and in a file a map such as \
                {{\"batch\": {{\"eps\": 0.001}}}}"
            ),
            ("batch", None, _) => Self::Batch(BatchNormOptions::default()),
            ("layer", None, _) => Self::Layer(LayerNormOptions::default()),
            ("instance", None, _) => Self::Instance(InstanceNormOptions::default()),
            ("rms", None, _) => Self::Rms(RmsNormOptions::default()),
            ("switch", None, _) => Self::Switch(SwitchNormOptions::default()),
            ("weight", None, _) => Self::Weight(WeightNormOptions::default()),
            (_, None, _) => Self::None,
        })
    }
}

#[cfg(feature = "serde")]
mod serde_form {
    //! In a file, a layer is its name, or a map from its name to its options.

    use serde::Deserialize;
    use serde::de::{self, Deserializer, IgnoredAny, MapAccess, Visitor};

    use super::*;

    #[derive(serde::Serialize)]
    #[serde(untagged)]
    pub(super) enum Form {
        Name(String),
        Options(Options),
    }

    #[derive(serde::Serialize)]
    #[serde(rename_all = "snake_case")]
    pub(super) enum Options {
        Batch(BatchNormOptions),
        Layer(LayerNormOptions),
        Group(GroupForm),
        Instance(InstanceNormOptions),
        Rms(RmsNormOptions),
        Switch(SwitchNormOptions),
        Weight(WeightNormOptions),
    }

    #[derive(serde::Serialize, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct GroupForm {
        num_groups: usize,
        #[serde(default)]
        options: GroupNormOptions,
    }

    impl From<NormConfig> for Form {
        fn from(config: NormConfig) -> Self {
            let name = config.to_string();
            if name
                .parse::<NormConfig>()
                .is_ok_and(|plain| plain == config)
            {
                return Self::Name(name);
            }
            Self::Options(match config {
                NormConfig::None => return Self::Name(name),
                NormConfig::Batch(o) => Options::Batch(o),
                NormConfig::Layer(o) => Options::Layer(o),
                NormConfig::Group {
                    num_groups,
                    options,
                } => Options::Group(GroupForm {
                    num_groups,
                    options,
                }),
                NormConfig::Instance(o) => Options::Instance(o),
                NormConfig::Rms(o) => Options::Rms(o),
                NormConfig::Switch(o) => Options::Switch(o),
                NormConfig::Weight(o) => Options::Weight(o),
            })
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
            let Some(kind) = name::kind(&name) else {
                return Err(match name.parse::<NormConfig>() {
                    Ok(_) => de::Error::custom(format!(
                        "NormConfig: expected the number of groups among the options, as in \
                        {{\"group\": {{\"num_groups\": 8}}}}, got {name:?}"
                    )),
                    Err(error) => de::Error::custom(error),
                });
            };
            let config = match kind {
                "batch" => NormConfig::Batch(map.next_value()?),
                "layer" => NormConfig::Layer(map.next_value()?),
                "group" => {
                    let GroupForm {
                        num_groups,
                        options,
                    } = map.next_value()?;
                    NormConfig::Group {
                        num_groups,
                        options,
                    }
                }
                "instance" => NormConfig::Instance(map.next_value()?),
                "rms" => NormConfig::Rms(map.next_value()?),
                "switch" => NormConfig::Switch(map.next_value()?),
                "weight" => NormConfig::Weight(map.next_value()?),
                _ => {
                    return Err(de::Error::custom(
                        "NormConfig: expected a norm with options, got none, which has no options: \
                        write its name alone",
                    ));
                }
            };
            if map.next_key::<IgnoredAny>()?.is_some() {
                return Err(de::Error::custom(
                    "NormConfig: expected one norm, got several",
                ));
            }
            // What has no name is no norm: a group norm without groups.
            config
                .to_string()
                .parse::<NormConfig>()
                .map_err(de::Error::custom)?;
            Ok(config)
        }
    }
}
