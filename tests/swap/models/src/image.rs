//! Models of images alone.

use crate::config::small;
use candle_core::{Device, Module, Tensor};
use kit::Model;
use serde_json::json;
use zoo::models::*;

/// candle has no gradient of a maximum over windows that overlap.
const OVERLAPPING: &str = "max_pool2d with overlapping windows";

pub const MODELS: &[Model] = &[
    Model::new("beit", "BEiT", |run| {
        beit::BeitVisionTransformer::new(run.vb.clone(), 2, 64, 4)?.forward(&run.noise((1, 3, 384, 384))?)
    }),
    Model::new("convmixer", "ConvMixer 1024/20", |run| {
        convmixer::c1024_20(10, run.vb.clone())?.forward(&run.noise((1, 3, 28, 28))?)
    })
    .slow(),
    Model::new("convnext", "ConvNeXt atto", |run| {
        convnext::convnext(&convnext::Config::atto(), 10, run.vb.clone())?.forward(&run.images(64)?)
    }),
    Model::new("convnext", "ConvNeXt tiny", |run| {
        convnext::convnext(&convnext::Config::tiny(), 10, run.vb.clone())?
            .forward(&run.noise((1, 3, 64, 64))?)
    })
    .slow(),
    Model::new("depth_anything_v2", "Depth Anything v2", |run| {
        let backbone = dinov2::DinoVisionTransformer::new(run.vb.pp("pretrained"), 4, 64, 4)?;
        let (size, widths, layers) = (112, [16, 16, 32, 32], vec![0, 1, 2, 3]);
        let config = depth_anything_v2::DepthAnythingV2Config::new(
            widths,
            64,
            16,
            true,
            false,
            layers,
            size,
            size / 14,
        );
        let model = depth_anything_v2::DepthAnythingV2::new(backbone.into(), config, run.vb.clone())?;
        model.forward(&run.noise((1, 3, size, size))?)
    })
    .no_gradients("upsampling by a factor that is not whole"),
    Model::new("dinov2", "DINOv2", |run| {
        dinov2::DinoVisionTransformer::new(run.vb.clone(), 2, 64, 4)?.forward(&run.noise((1, 3, 518, 518))?)
    }),
    Model::new("dinov2reg4", "DINOv2 with registers", |run| {
        dinov2reg4::DinoVisionTransformer::new(run.vb.clone(), 2, 64, 4)?
            .forward(&run.noise((1, 3, 518, 518))?)
    }),
    Model::new("efficientnet", "EfficientNet-B0", |run| {
        let config = efficientnet::MBConvConfig::b0();
        efficientnet::EfficientNet::new(run.vb.clone(), config, 10)?.forward(&run.images(64)?)
    }),
    Model::new("efficientvit", "EfficientViT-M0", |run| {
        efficientvit::efficientvit(&efficientvit::Config::m0(), 10, run.vb.clone())?
            .forward(&run.images(224)?)
    }),
    Model::new("eva2", "EVA-02", |run| {
        eva2::EVA2VisionTransformer::new(run.vb.clone(), 2, 64, 1)?.forward(&run.noise((1, 3, 448, 448))?)
    }),
    Model::new("fastvit", "FastViT-T8", |run| {
        run.without(no_fastvit);
        fastvit::fastvit(&fastvit::Config::t8(), 10, run.vb.clone())?.forward(&run.images(64)?)
    }),
    Model::new("hiera", "Hiera, tiny widths", |run| {
        let config = small(json!({ "channels": 16, "heads": 1, "stages": [1, 1, 1, 1] }))?;
        // A projection, where the number of channels changes.
        run.without(|name, shape| {
            name.split('.').count() == 4 && name.ends_with("proj.weight") && shape[0] == shape[1]
        });
        hiera::hiera(&config, 10, run.vb.clone())?.forward(&run.noise((1, 3, 224, 224))?)
    }),
    Model::new("mobilenetv4", "MobileNetV4 small", |run| {
        mobilenetv4::mobilenetv4(&mobilenetv4::Config::small(), 10, run.vb.clone())?.forward(&run.images(64)?)
    }),
    Model::new("mobileone", "MobileOne-S0", |run| {
        mobileone::mobileone(&mobileone::Config::s0(), 10, run.vb.clone())?.forward(&run.images(64)?)
    }),
    Model::new("repvgg", "RepVGG-A0", |run| {
        repvgg::repvgg(&repvgg::Config::a0(), 10, run.vb.clone())?.forward(&run.images(64)?)
    }),
    Model::new("resnet", "ResNet-18", |run| resnet::resnet18(10, run.vb.clone())?.forward(&run.images(64)?))
        .no_gradients(OVERLAPPING),
    Model::new("resnet", "ResNet-50", |run| resnet::resnet50(10, run.vb.clone())?.forward(&run.images(64)?))
        .no_gradients(OVERLAPPING),
    Model::new("segformer", "SegFormer, segmentation", |run| {
        segformer::SemanticSegmentationModel::new(&small(segformer())?, 5, run.vb.clone())?
            .forward(&run.images(32)?)
    }),
    Model::new("segformer", "SegFormer, classification", |run| {
        segformer::ImageClassificationModel::new(&small(segformer())?, 5, run.vb.clone())?
            .forward(&run.images(32)?)
    }),
    Model::new("segment_anything", "Segment Anything, ViT encoder", |run| {
        let vit = segment_anything::image_encoder::ImageEncoderViT::new(
            64,
            8,
            3,
            32,
            2,
            4,
            16,
            true,
            false,
            true,
            4,
            &[1],
            run.vb.clone(),
        )?;
        vit.forward(&run.noise((1, 3, 64, 64))?)
    }),
    Model::new("segment_anything", "Segment Anything, ViT encoder with relative positions", |run| {
        let vit = segment_anything::image_encoder::ImageEncoderViT::new(
            64,
            8,
            3,
            32,
            2,
            4,
            16,
            true,
            true,
            true,
            4,
            &[1],
            run.vb.clone(),
        )?;
        vit.forward(&run.noise((1, 3, 64, 64))?)
    })
    .no_f64("adds its relative positions by an operation in f32 alone"),
    Model::new("segment_anything", "Segment Anything, prompts and masks", |run| {
        let prompts = segment_anything::prompt_encoder::PromptEncoder::new(
            32,
            (8, 8),
            (64, 64),
            16,
            run.vb.pp("prompt"),
        )?;
        let points = run.noise((1, 2, 2))?;
        let labels = Tensor::ones((1, 2), run.dtype, &Device::Cpu)?;
        let masks = run.noise((1, 1, 32, 32))?;
        let (sparse, dense) = prompts.forward(Some((&points, &labels)), None, Some(&masks))?;
        let decoder = segment_anything::mask_decoder::MaskDecoder::new(32, 3, 3, 32, run.vb.pp("mask"))?;
        let image = run.noise((1, 32, 8, 8))?;
        let (masks, quality) = decoder.forward(&image, &prompts.get_dense_pe()?, &sparse, &dense, true)?;
        Tensor::cat(&[masks.flatten_from(2)?, quality.unsqueeze(2)?], 2)
    }),
    Model::new("segment_anything", "Segment Anything, TinyViT encoder", |run| {
        let (widths, depths, heads, windows) =
            ([16, 16, 32, 320], [1, 1, 1, 1], [1, 1, 2, 10], [7, 7, 14, 7]);
        let vit =
            segment_anything::tiny_vit::TinyViT::new(&widths, &depths, &heads, &windows, 10, run.vb.clone())?;
        vit.forward(&run.noise((1, 3, 1024, 1024))?)
    }),
    Model::new("vit", "ViT", |run| {
        let config = small(json!({ "hidden_act": "gelu", "qkv_bias": true }))?;
        vit::Model::new(&config, 10, run.vb.clone())?.forward(&run.images(32)?)
    }),
];

/// What FastViT finds in a checkpoint before it is made of single convolutions, and leaves alone without it.
pub fn no_fastvit(name: &str, _: &[usize]) -> bool {
    let has = |part: &str| name.contains(part);
    has("conv_scale")
        || has(".se.")
        || has("identity")
        || has("stages.0.downsample")
        || (has("pos_emb") && !has("stages.3"))
}

fn segformer() -> serde_json::Value {
    json!({
        "id2label": {}, "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
        "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
        "hidden_act": "gelu", "decoder_hidden_size": 32,
    })
}
