// The layers of network.cpp that TensorRT has since version 10, and a few that it had before but its parser did not use.

// The axes of a Squeeze or an Unsqueeze, which its second input gives, in a tensor of `rank` axes.
static std::vector<Size> axes_of(Tensor const& given, int32_t rank)
{
    std::vector<Size> axes;
    if (!given.has_values)
        object("axes that are not known");
    for (Size axis : given.values)
        axes.push_back(axis < 0 ? axis + rank : axis);
    std::sort(axes.begin(), axes.end());
    return axes;
}

struct Unsqueeze final : Layer<IUnsqueezeLayer, mock::DVUnsqueezeLayer>
{
    Unsqueeze(ITensor& tensor, ITensor& given) : Layer(LayerType::kUNSQUEEZE, {&tensor, &given})
    {
        std::vector<Size> sizes = sizes_of(in(0)), axes = axes_of(own(&given), in(0).nbDims + int32_t(in(1).d[0]));
        for (Size axis : axes)
            sizes.insert(sizes.begin() + axis, 1);
        output.dims = dims_of(sizes);
        if (own(&tensor).has_values && sizes.size() <= 1)
            output.know(own(&tensor).values);
    }
};

struct Squeeze final : Layer<ISqueezeLayer, mock::DVSqueezeLayer>
{
    Squeeze(ITensor& tensor, ITensor& given) : Layer(LayerType::kSQUEEZE, {&tensor, &given})
    {
        std::vector<Size> sizes = sizes_of(in(0)), axes = axes_of(own(&given), in(0).nbDims);
        for (size_t i = axes.size(); i-- > 0;) {
            if (sizes.at(axes[i]) > 1)
                object("an axis longer than 1 cannot be left out: " + text(in(0)));
            sizes.erase(sizes.begin() + axes[i]);
        }
        output.dims = dims_of(sizes);
        if (own(&tensor).has_values)
            output.know(own(&tensor).values);
    }
};

struct Normalization final : Layer<INormalizationLayer, mock::DVNormalizationLayer>
{
    Normalization(ITensor& tensor, ITensor& scale, ITensor& bias, uint32_t axes)
        : Layer(LayerType::kNORMALIZATION, {&tensor, &scale, &bias})
    {
        if (scale.getType() != output.type || bias.getType() != output.type || !is_float(output.type))
            object("a normalisation of two types, or of integers");
        for (size_t place : {1, 2})
            if (text(broadcast(in(0), in(place))) != text(in(0)))
                object("a normalisation whose scale or bias is larger than its input");
        tell("axes", {double(axes)}), tell("groups", {1.0}), tell("epsilon", {1e-5});
    }
    void setEpsilon(float epsilon) noexcept override { tell("epsilon", {epsilon}); }
    void setNbGroups(int64_t groups) noexcept override
    {
        tell("groups", {double(groups)});
        if (in(0).d[1] % groups)
            object("a channel too many for its groups: " + text(in(0)));
    }
    void setComputePrecision(DataType) noexcept { object("a precision that is not the graph's"); }
};

#if HAS_ATTENTION
struct Attention final : IAttention, mock::DVAttention
{
    AnyLayer layer;

    Attention(ITensor& query, ITensor& key, ITensor& value, AttentionNormalizationOp how, bool causal)
    {
        mImpl = this;
        layer.kind = LayerType::kATTENTION_INPUT, layer.inputs = {&query, &key, &value};
        layer.output.type = query.getType(), layer.output.dims = layer.in(0);
        layer.tell("causal", {double(causal)}), layer.tell("softmax", {double(how == AttentionNormalizationOp::kSOFTMAX)});
        Dims q = layer.in(0), k = layer.in(1), v = layer.in(2);
        if (key.getType() != query.getType() || value.getType() != query.getType() || !is_float(query.getType()))
            object("an attention of two types, or of integers");
        if (q.nbDims != 4 || k.nbDims != 4 || v.nbDims != 4 || q.d[1] != k.d[1] || q.d[3] != k.d[3] || q.d[3] < 0)
            object("an attention to " + text(k) + " of " + text(q) + ": heads or their width are unlike or not known");
    }
    bool setName(char const* name) noexcept override { return layer.name = name, true; }
    char const* getName() const noexcept override { return layer.name.c_str(); }
    bool setMetadata(char const*) noexcept override { return true; }
    int32_t getNbInputs() const noexcept override { return layer.getNbInputs(); }
    int32_t getNbOutputs() const noexcept override { return 1; }
    ITensor* getInput(int32_t place) const noexcept override { return layer.getInput(place); }
    ITensor* getOutput(int32_t) const noexcept override { return layer.getOutput(0); }
    bool setDecomposable(bool on) noexcept override { return layer.tell("decomposable", {double(on)}), true; }
    bool setMask(ITensor& mask) noexcept override
    {
        layer.inputs.push_back(&mask);
        if (mask.getType() != DataType::kBOOL && mask.getType() != layer.output.type)
            object("a mask of another type");
        Dims scores = layer.in(0);
        scores.d[3] = layer.in(1).d[2];
        if (mask.getDimensions().nbDims != 4 || text(broadcast(scores, mask.getDimensions())) != text(scores))
            object("a mask " + text(mask.getDimensions()) + " for scores " + text(scores));
        return true;
    }
};
#endif
